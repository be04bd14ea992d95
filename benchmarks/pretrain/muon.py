"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024; arXiv 2502.16982)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atomdiff.utils.precision import has_instructions

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROW_STEP, _COLUMN_STEP = 64, 512  # on a GPU, matrices padded to multiples of these are made orthogonal together


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (k, m, n), m <= n, with singular values near 1: Newton-Schulz iterations of degree five.

    In float32 they run on the products (k, m, m) of the matrices with their transposes, which is two to three times
    faster; bfloat16 has too few digits for that.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if has_instructions("bf16", matrices.device) else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.dtype == torch.bfloat16:
        for _ in range(steps):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x
    square = x @ x.mT
    factor = polynomial = eye = torch.eye(x.shape[1], device=x.device)
    for step in range(steps):
        square = polynomial @ square @ polynomial if step else square
        polynomial = a * eye + b * square + c * square @ square
        factor = polynomial @ factor if step else polynomial
    return factor @ x


def _bucket(shape: Sequence[int], padded: bool) -> tuple[int, int]:
    """The size that a matrix is made orthogonal in, the smaller side first."""
    low, high = sorted(shape)
    if not padded:
        return low, high
    return -(-low // _ROW_STEP) * _ROW_STEP, -(-high // _COLUMN_STEP) * _COLUMN_STEP


class Muon(torch.optim.Optimizer):
    """Muon for weights of two dimensions and more, each seen as a matrix (outputs, everything else).

    Args:
        params: the weights.
        lr: root mean square of an update relative to 0.2 (arXiv 2502.16982, eq. 4), so that a rate for AdamW fits; a
            number, or a tensor that a CUDA graph reads.
        momentum: of the gradients, Nesterov's.
        weight_decay: share of the weights that a step at rate 1 takes away.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in weights]
            for p in weights:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            kept = [self.state[p]["momentum"] for p in weights]
            torch._foreach_lerp_(kept, gradients, 1 - group["momentum"])
            mixed = list(torch._foreach_lerp(gradients, kept, group["momentum"]))
            buckets = defaultdict(list)
            for index, update in enumerate(mixed):
                matrix = update.flatten(1)
                buckets[_bucket(matrix.shape, padded=update.is_cuda)].append((index, matrix))
            for (low, high), members in buckets.items():
                wide = [m if m.shape[0] <= m.shape[1] else m.mT for _, m in members]
                padded = torch.stack([F.pad(m, (0, high - m.shape[1], 0, low - m.shape[0])) for m in wide])
                for (index, matrix), solved in zip(members, orthogonalize(padded), strict=True):
                    rows, columns = matrix.shape
                    update = solved[:rows, :columns] if rows <= columns else solved[:columns, :rows].mT
                    mixed[index] = update.reshape(weights[index].shape).to(weights[index].dtype)
            sizes = [0.2 * max(len(p), p[0].numel()) ** 0.5 for p in weights]
            torch._foreach_mul_(mixed, sizes)
            torch._foreach_mul_(mixed, group["lr"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(weights, mixed)


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for embeddings, first and last layers, norms and biases.

    Their rates are tensors on the model's device, so that a CUDA graph of a step reads the rate of the moment.
    """
    outer = ("conv_in", "conv_out", "embedding", "quant_conv", "head")
    inside: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inside if p.ndim > 1 and not any(part in name for part in outer) else others).append(p)
    rate, cuda = torch.tensor(lr, device=others[0].device), others[0].is_cuda
    adamw = torch.optim.AdamW(
        others, rate, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=False, fused=cuda, capturable=cuda
    )
    return [Muon(inside, rate.clone(), weight_decay=weight_decay), adamw] if inside else [adamw]
