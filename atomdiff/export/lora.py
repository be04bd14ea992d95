"""The active concepts as a LoRA of a given rank, for other programs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.atoms.basis import gram
from atomdiff.export.kohya import layer_name, write_file
from atomdiff.export.report import ExportedLayer, ExportReport
from atomdiff.export.tensor_file import to_file_dtype
from atomdiff.pipelines.differences import layer_differences
from atomdiff.utils.errors import UserError

_MAX_RANK = 65536  # more than any layer's smaller side
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def export_lora(
    pipe: Any,
    path: str | os.PathLike[str],
    rank: int = 16,
    *,
    dtype: torch.dtype = torch.float16,
    trigger_phrase: str = "",
) -> ExportReport:
    """Save the best low-rank approximation of what the active concepts change, with kohya's keys.

    A weight (out, in/groups, ...) becomes `lora_up` (out, r, 1, ...) and `lora_down` (r, in/groups, ...) with r =
    `rank`, or less where the layer is smaller, and `alpha` = `rank`. Grouped convolutions have the same form, as
    programs that merge read them.

    Args:
        pipe: a pipeline with concepts of any PEFT method; it stays as it is.
        path: the file; `.safetensors` is appended where it is missing. Token embeddings are written beside it.
        rank: rank of every layer.
        dtype: precision to save in.
        trigger_phrase: what to write in a prompt to get the concept.

    Raises:
        UserError: there is nothing to export, a LoRA file cannot hold it, or a value is too large for `dtype`.
    """
    check_rank(rank)
    tensors: dict[str, Tensor] = {}
    layers, biases = [], []
    for difference in layer_differences(pipe):
        name = layer_name(pipe, difference.component, difference.module)
        if isinstance(difference.layer, _TRANSPOSED):
            raise UserError(f"{name} is a transposed convolution, which has no LoRA in other programs: use --to diff")
        if (bias := difference.parameters.get("bias")) is not None and bias.any():
            biases.append(name)
        weight = difference.parameters["weight"]
        if not weight.any():
            continue
        matrix = weight.flatten(1)
        factors = low_rank(matrix, rank)
        scale = rank / len(factors[1])  # alpha / r, by which programs multiply what they load
        up, down = (to_file_dtype(factor / scale**0.5, dtype, name) for factor in factors)
        missed = matrix.cpu() - scale * up.float() @ down.float()
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        tensors[f"{name}.lora_down.weight"] = down.reshape(-1, *weight.shape[1:])
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))  # diffusers mistakes alphas that differ between layers
        layers.append(ExportedLayer(name, tuple(weight.shape), len(down), float(weight.norm()), float(missed.norm())))
    return write_file(
        pipe, path, tensors, layers, dtype=dtype, trigger_phrase=trigger_phrase, rank=rank, biases_left_out=biases
    )


def check_rank(rank: int) -> None:
    """Refuse a rank that no layer can have.

    Raises:
        UserError: it is below 1 or above 65,536.
    """
    if not 1 <= rank <= _MAX_RANK:
        raise UserError(f"rank={rank}: expected 1 to {_MAX_RANK}")


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank in the Frobenius norm (Eckart, Young 1936): `up @ down`.

    The singular vectors of the shorter side come from its Gram matrix in float64; both factors get the square roots of
    the singular values, so that both keep clear of the limits of half precision.

    Args:
        matrix: (m, n).
        rank: at least 1; cut to min(m, n).

    Returns:
        up (m, r) and down (r, n), float32, the largest singular value first.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = low_rank(matrix.T, rank)
        return up.T, down.T
    vectors = torch.linalg.eigh(gram(matrix.T))[1].flip(1)[:, :rank].to(torch.float32).to(matrix.device)  # (m, r)
    projected = vectors.T @ matrix.to(torch.float32)  # (r, n): singular values times right-singular vectors
    balance = projected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return vectors * balance, projected / balance[:, None]
