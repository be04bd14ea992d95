"""Open a diffusers pipeline that a user has named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atomdiff.errors import UserError


def open_pipeline(name: str, dtype: torch.dtype, *, revision: str | None = None, variant: str | None = None) -> Any:
    """Load a diffusers pipeline.

    Args:
        name: a folder or a Hub id.
        dtype: precision of its weights.
        revision: on the Hub.
        variant: of its files, such as fp16.

    Raises:
        UserError: it is not there, or cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, dtype=dtype)
    except (OSError, ValueError) as error:
        found = "is there, but" if Path(name).is_dir() else "is no folder here, and as a Hub id"
        raise UserError(f"the pipeline {name!r} {found} cannot be loaded ({' '.join(str(error).split())})") from error
