"""Write tensors to safetensors files for other programs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.utils.atomic import new_file
from atomdiff.utils.errors import UserError


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file with metadata, atomically."""
    with new_file(path) as file:
        save_file(tensors, file, metadata={"format": "pt", **metadata})


def to_file_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor on the CPU in the dtype of a file.

    Raises:
        UserError: a value is not finite, or too large for `dtype`.
    """
    written = tensor.to("cpu", dtype).contiguous()
    if not torch.isfinite(written).all():
        raise UserError(f"{name}: values are not finite or too large for {dtype}; export with --dtype float32")
    return written
