"""What the page works with: the base, the library, the training jobs and what makes images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.training.contact_sheet import list_row_files
from atomdiff.ui import library
from atomdiff.ui.config import UiConfig
from atomdiff.ui.images import EngineImages
from atomdiff.ui.job import Job
from atomdiff.ui.jobs import JobQueue
from atomdiff.ui.page_concepts import PageConcepts
from atomdiff.utils.atomic import writing


@dataclass(frozen=True)
class Workspace:
    """Everything behind the page; all who open it share one."""

    config: UiConfig
    library: ConceptLibrary
    jobs: JobQueue
    images: EngineImages


def open_workspace(config: UiConfig) -> Workspace:
    """Open the folders of a page, which are made if missing; the queue does not run yet.

    Raises:
        UserError: a folder cannot be read or written.
    """
    for folder in (Path(config.library), config.jobs_folder, config.images_folder, config.exports_folder):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    concepts = ConceptLibrary(config.library)
    jobs = JobQueue(config.jobs_folder, lambda job: add_result(concepts, job))
    return Workspace(config, concepts, jobs, EngineImages(config, PageConcepts(concepts, jobs)))


def add_result(concepts: ConceptLibrary, job: Job) -> None:
    """Add the concept file of a finished job to the library, with its last validation image.

    Raises:
        OSError: the file cannot be read, or the library cannot be written to.
        UserError: the library cannot be read.
    """
    result = job.result
    if result is None or not result.is_file():  # another method's folder
        return
    images = list_row_files(job.run_folder)
    library.add(concepts, result, images[-1][1] if images else None)
