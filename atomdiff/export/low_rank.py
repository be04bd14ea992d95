"""The best low-rank approximation of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from atomdiff.atoms.basis import gram


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
    vectors = torch.linalg.eigh(gram(matrix.T))[1].flip(1)[:, :rank].to(torch.float32)  # (m, r)
    projected = vectors.T @ matrix.to(torch.float32)  # (r, n): singular values times right-singular vectors
    balance = projected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return vectors * balance, projected / balance[:, None]
