"""The concepts that prompts of the page may name: the library's, and those that trainings save on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.concept_source import ConceptSource, open_source
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.ui.job import Job
from atomdiff.ui.jobs import JobQueue


def step_name(job: Job, step: int) -> str:
    """Return what prompts call the concept of a step: the name of its file, and for the last step one like it."""
    return f"{job.name}-step-{step:06d}"


class PageConcepts(ServedConcepts):
    """Finds the concepts of prompts in a library, and those of steps of training jobs, by `step_name`.

    Args:
        library: the concepts.
        jobs: the training jobs.
    """

    def __init__(self, library: ConceptLibrary, jobs: JobQueue) -> None:
        super().__init__(library)
        self._jobs = jobs
        self._opened: dict[Path, tuple[tuple[int, int, int], ConceptSource]] = {}

    def find(self, weights: Mapping[str, Any]) -> list[tuple[ConceptSource, AdapterWeight]]:
        """Return the concepts of a request with their weights; see `ServedConcepts`."""
        checkpoints: dict[str, Path] = {}
        if any(name not in self.library for name in weights):
            for job in self._jobs.jobs():
                checkpoints |= {step_name(job, step): file for step, file in job.saved_steps.items()}
        found: list[tuple[ConceptSource, AdapterWeight]] = []
        for name, value in weights.items():
            if name in checkpoints and name not in self.library:
                found.append((self._open(name, checkpoints[name]), AdapterWeight.read(value)))
            else:
                found += super().find({name: value})
        return found

    def _open(self, name: str, file: Path) -> ConceptSource:
        status = file.stat()
        stamp = status.st_size, status.st_mtime_ns, status.st_ino  # another job of this name has other files
        if file not in self._opened or self._opened[file][0] != stamp:
            self._opened[file] = stamp, replace(open_source(str(file)), name=name)
        return self._opened[file][1]
