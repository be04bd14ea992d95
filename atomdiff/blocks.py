"""Weights seen as rows of small blocks, and rows of blocks folded back into weights."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

Block = tuple[int, int]


def fit_block(weight_shape: Sequence[int], channel_block: int) -> Block:
    """Choose the block of channels for one weight.

    Args:
        weight_shape: (out, in/groups, ...) as the module stores it.
        channel_block: wanted size of the block along both channel axes, at least 1.

    Returns:
        (p, q), the size along the first and the second axis; a side that `channel_block` does not divide gets 1.
    """
    first, second = weight_shape[:2]
    return (
        channel_block if first % channel_block == 0 else 1,
        channel_block if second % channel_block == 0 else 1,
    )


def as_kernels(weight: Tensor) -> Tensor:
    """Give a weight its kernel axes: (out, in/groups, ...) -> (out, in/groups, k, l), absent axes being 1."""
    return weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))


def kernel_rows(weight: Tensor) -> Tensor:
    """One row a kernel: (out, in/groups, k, l) -> rows (out * in/groups, k * l)."""
    return rearrange(as_kernels(weight), "o i k l -> (o i) (k l)")


def channel_rows(weight: Tensor, block: Block) -> Tensor:
    """One row a block of channels and kernel position: (out, in/groups, k, l) -> rows (blocks * k * l, p * q)."""
    p, q = block
    return rearrange(as_kernels(weight), "(o p) (i q) k l -> (o i k l) (p q)", p=p, q=q)
