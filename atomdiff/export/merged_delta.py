"""Exact weight differences of the active concepts in a file for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.export.embeddings import active_embeddings, save_embeddings
from atomdiff.export.kohya import layer_name, metadata, unread_by, zero_layers
from atomdiff.export.report import ExportedLayer, ExportReport
from atomdiff.export.tensor_file import save_tensors, to_file_dtype
from atomdiff.pipelines.differences import layer_differences
from atomdiff.utils.errors import UserError


def file_path(output: str | os.PathLike[str]) -> Path:
    """Return the output path, with `.safetensors` appended where it is missing."""
    path = Path(output)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def export_diff(
    pipe: Any, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16, trigger_phrase: str = ""
) -> ExportReport:
    """Save the exact weight differences of the active concepts, with kohya's and LyCORIS's keys `.diff` and `.diff_b`.

    Args:
        pipe: a pipeline with concepts of any PEFT method; a merged one is restored.
        path: the file; `.safetensors` is appended where it is missing. Token embeddings are written beside it.
        dtype: precision to save in.
        trigger_phrase: what to write in a prompt to get the concept.

    Raises:
        UserError: there is nothing to export, such a file cannot hold it, or a value is too large for `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for difference in layer_differences(pipe):
        name = layer_name(pipe, difference.component, difference.module)
        weight = difference.parameters["weight"]
        tensors[f"{name}.diff"] = to_file_dtype(weight, dtype, name)
        if (bias := difference.parameters.get("bias")) is not None and bias.any():
            tensors[f"{name}.diff_b"] = to_file_dtype(bias, dtype, name)
        residual = float((weight.cpu() - tensors[f"{name}.diff"].float()).norm())
        layers.append(ExportedLayer(name, tuple(weight.shape), None, float(weight.norm()), residual))
    return write_file(pipe, Path(path), tensors, layers, dtype, trigger_phrase)


def write_file(
    pipe: Any,
    path: Path,
    tensors: dict[str, Tensor],
    layers: list[ExportedLayer],
    dtype: torch.dtype,
    trigger_phrase: str,
    rank: int | None = None,
    biases: list[str] | None = None,
) -> ExportReport:
    """Write the tensors of an export, with the embeddings of the active trigger words beside the file."""
    path, embeddings = file_path(path), active_embeddings(pipe)
    if not tensors and not embeddings:
        raise UserError(
            "found nothing to export: no active concept changes the pipeline; load one with a weight other than 0"
        )
    if tensors:
        tensors = tensors | zero_layers(pipe, tensors, float(rank or 1))
        save_tensors(path, tensors, metadata(pipe, path.stem, trigger_phrase, rank))
    files = save_embeddings(path.parent, f"{path.stem}-", embeddings, dtype)
    unread = unread_by([layer.name for layer in layers], whole=rank is None)
    return ExportReport(path, tuple(layers), files, tuple(biases or ()), unread)
