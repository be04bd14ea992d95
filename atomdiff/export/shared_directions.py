"""Mixes of shared directions that explain the most: dD_l = sum over k of a_lk * E_k for the layers l of one kind."""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor

_RANK_TOLERANCE = 1e-12  # of squared singular values: what is below comes from rounding in float32
_MAX_TURNS = 200
_SETTLED = 1e-7  # a turn that explains more by a smaller part is the last


def nearest_mixes(rows: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The a and E that minimize the sum over the layers of |weight * (row - a @ E)|^2.

    Args:
        rows: (layers, size), float64.
        weights: of the layers (layers,), float64.
        count: directions n.

    Returns:
        a (layers, n), of about 1, as half precision likes it, and E (n, size).
    """
    weights = weights[:, None].clamp(min=1e-30)
    left, values, right = torch.linalg.svd(weights * rows, full_matrices=False)
    rank = min(count, len(values))
    size = rows.norm(dim=1).max().clamp(min=1e-30)
    mixes, directions = rows.new_zeros(len(rows), count), rows.new_zeros(count, rows.shape[1])
    mixes[:, :rank], directions[:rank] = (left * values / weights / size)[:, :rank], size * right[:rank]
    return mixes, directions


def improved_mixes(mixes: Tensor, squares: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Lessen the sum over the layers of |R - A @ dD|^2 by solving for E and for a in turn, until it helps no more.

    Each solution is exact while the other factor stays, from the normal equations of all layers.

    Args:
        mixes: a at first (layers, n), float64.
        squares: A.T @ A of each layer (layers, m, m).
        mixed: A.T @ R of each layer (layers, m, d).

    Returns:
        a (layers, n) and E (n, m * d), as `nearest_mixes`.
    """
    count, (layers, m, d) = mixes.shape[1], mixed.shape
    explained, before = 0.0, -math.inf
    shared = mixed[:0]
    for _ in range(_MAX_TURNS):
        if explained <= before + _SETTLED * abs(before):
            break
        mixes, _ = torch.linalg.qr(mixes)  # others that span the same
        left = einsum(mixes, mixes, squares, "l k, l j, l a b -> k a j b").reshape(2 * [mixes.shape[1] * m])
        right = einsum(mixes, mixed, "l k, l a d -> k a d").reshape(-1, d)
        shared = _solve(left, right).reshape(-1, m, d)
        left = einsum(shared, squares, shared, "k a d, l a b, j b d -> l k j")
        right = einsum(shared, mixed, "k a d, l a d -> l k")
        mixes = _solve(left, right[..., None])[..., 0]
        before, explained = explained, float((mixes * right).sum())
    return nearest_mixes(mixes @ shared.flatten(1), mixes.new_ones(layers), count)


def _solve(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.pinv(left, rtol=_RANK_TOLERANCE, hermitian=True) @ right
