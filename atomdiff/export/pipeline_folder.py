"""A diffusers pipeline folder with the active concepts merged in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from atomdiff.export.embeddings import active_embeddings, save_embeddings
from atomdiff.export.report import ExportReport
from atomdiff.pipelines.differences import merged_copy
from atomdiff.pipelines.portable import save_portable
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.paths import check_empty


def export_pipeline(pipe: Any, folder: str | os.PathLike[str]) -> ExportReport:
    """Save a pipeline with its active concepts merged into the weights, and the trigger words of all loaded ones.

    The pipeline stays as it is; the files have its dtype. Token embeddings of active concepts are also saved in the
    folder's `embeddings`, for programs that take a checkpoint made of it.

    Raises:
        UserError: the folder is not empty, or an adapter cannot be merged.
    """
    folder = Path(folder)
    check_empty(folder, "folder")
    active = active_embeddings(pipe)
    dtype = pipe.components["text_encoder"].dtype if active else torch.float32
    with new_folder(folder) as unfinished:
        longer = save_portable(merged_copy(pipe), unfinished)
        embeddings = save_embeddings(unfinished / "embeddings", "", active, dtype)
    embeddings = {word: folder / file.relative_to(unfinished) for word, file in embeddings.items()}
    return ExportReport(folder, embeddings=embeddings, longer_tables=longer, is_folder=True)
