"""The active concepts as exact weight differences, for other programs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from atomdiff.export.kohya import layer_name, write_file
from atomdiff.export.report import ExportedLayer, ExportReport
from atomdiff.export.tensor_file import to_file_dtype
from atomdiff.pipelines.differences import layer_differences


def export_diff(
    pipe: Any, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16, trigger_phrase: str = ""
) -> ExportReport:
    """Save the exact weight differences of the active concepts, with kohya's and LyCORIS's keys `.diff` and `.diff_b`.

    Args:
        pipe: a pipeline with concepts of any PEFT method; it stays as it is.
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
    return write_file(pipe, path, tensors, layers, dtype=dtype, trigger_phrase=trigger_phrase)
