"""Fit atoms to a weight and apply their change to it.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

A weight seen as rows X (blocks, d) is X = A @ D + residual with m atoms D (m, d). Training changes the atoms only:
X' = X + A @ dD. The atoms here are orthonormal, so A = X @ D.T and

    X' = X + X @ D.T @ dD = X @ (I + S)        S = D.T @ dD  (d, d)

which needs no coefficients at all. With separable channel blocks each block, a matrix B (p * q, k * l), becomes
(I + C).T @ B @ (I + S). Concepts that are worn together add their S and their C before a weight is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from atomdiff.blocks import Block, as_kernels

_ROWS_AT_ONCE = 1 << 16  # so that a large weight is never there in float64 as a whole


def gram(rows: Tensor) -> Tensor:
    """Gram matrix of rows (blocks, d) in float64: X.T @ X (d, d)."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(_ROWS_AT_ONCE):
        wide = part.to(torch.float64)
        total += wide.T @ wide
    return total


def singular_values(rows: Tensor) -> Tensor:
    """Singular values of rows (blocks, d) in descending order, float64 (d,).

    Raises:
        ValueError: a value in `rows` is not finite.
    """
    return _decompose(rows)[0]


def svd_atoms(rows: Tensor, num_atoms: int) -> Tensor:
    """The top right-singular vectors of rows (blocks, d), as float32 atoms (num_atoms, d).

    The sign of each atom makes its entry of largest magnitude positive. Signs and order may still differ between
    libraries where singular values are equal, so whoever stores a delta stores the atoms beside it.

    Raises:
        ValueError: a value in `rows` is not finite, or `num_atoms` is not within 1..d.
    """
    _check_num_atoms(num_atoms, rows.shape[1])
    atoms = _decompose(rows)[1][:num_atoms]  # (m, d)
    peaks = atoms.gather(1, atoms.abs().argmax(dim=1, keepdim=True))  # (m, 1)
    return (atoms * peaks.sign()).to(torch.float32).contiguous()


def dct_atoms(axes: Sequence[int], num_atoms: int) -> Tensor:
    """Orthonormal DCT-II atoms of a block, float32 (num_atoms, d), d = product of `axes`.

    The Kronecker product runs in the order of `axes`; atoms are in row-major order of frequency, lowest first.

    Raises:
        ValueError: `num_atoms` is not within 1..d.
    """
    _check_num_atoms(num_atoms, math.prod(axes))
    atoms = torch.ones(1, 1, dtype=torch.float64)
    for size in axes:
        atoms = torch.kron(atoms, _dct_matrix(size))
    return atoms[:num_atoms].to(torch.float32).contiguous()


def update_matrix(atoms: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """S = scale * D.T @ dD: atoms (m, d), delta (m, d) -> (d, d), in at least float32."""
    wide = torch.promote_types(delta.dtype, torch.float32)
    return scale * (atoms.to(wide).T @ delta.to(wide))


def sum_channel_matrices(matrices: Iterable[tuple[Block, Tensor]]) -> tuple[Block, Tensor]:
    """Add channel matrices C (p * q, p * q) of possibly different blocks.

    A matrix on small blocks acts on a larger block as one copy on each small block inside, so all are written on the
    smallest common block first.

    Returns:
        The common block (p, q) and the sum (p * q, p * q).
    """
    pairs = list(matrices)
    common = (math.lcm(*(block[0] for block, _ in pairs)), math.lcm(*(block[1] for block, _ in pairs)))
    lifted = [_lift(matrix, block, common) for block, matrix in pairs]
    return common, torch.stack(lifted).sum(dim=0) if len(lifted) > 1 else lifted[0]


def adapt_weight(
    weight: Tensor, spatial: Tensor | None = None, channel: Tensor | None = None, block: Block = (1, 1)
) -> Tensor:
    """The adapted weight: every block B (p * q, k * l) becomes (I + C).T @ B @ (I + S).

    The two factors commute. The sums run in float32 at least, and the result is rounded once, to the weight's dtype;
    zero matrices give back the very same values.

    Args:
        weight: (out, in/groups, k, l), or (out, in) of a Linear. Never changed.
        spatial: S (k * l, k * l), or None for zero.
        channel: C (p * q, p * q), or None for zero.
        block: (p, q), the channel block that C acts on.

    Returns:
        A tensor like `weight`, with the same strides.
    """
    wide = as_kernels(weight).to(torch.promote_types(weight.dtype, torch.float32))
    if spatial is not None:
        wide = _mix_kernel(wide, spatial)
    if channel is not None:
        wide = _mix_channels(wide, channel, block)
    adapted = wide.reshape(weight.shape)
    if adapted.dtype == weight.dtype and adapted.stride() == weight.stride():
        return adapted
    return torch.empty_like(weight, requires_grad=False).copy_(adapted)


def _mix_kernel(weight: Tensor, spatial: Tensor) -> Tensor:
    """X + X @ S on the kernel axes; transposed, so that the small matrix multiplies long rows (10x faster on CPU)."""
    columns = rearrange(weight, "o i k l -> o (k l) i")
    mixed = torch.baddbmm(columns, _repeat(spatial.T, columns), columns)
    return rearrange(mixed, "o (k l) i -> o i k l", k=weight.shape[2])


def _mix_channels(weight: Tensor, channel: Tensor, block: Block) -> Tensor:
    """B + C.T @ B on the channel axes of each block."""
    axes = {"p": block[0], "q": block[1], "k": weight.shape[2], "l": weight.shape[3]}
    columns = rearrange(weight, "(o p) (i q) k l -> o (p q) (k l i)", **axes)
    mixed = torch.baddbmm(columns, _repeat(channel.T, columns), columns)
    return rearrange(mixed, "o (p q) (k l i) -> (o p) (i q) k l", **axes)


def _repeat(matrix: Tensor, columns: Tensor) -> Tensor:
    """The matrix, once for each of the columns (n, d, width), in their dtype: (d, d) -> (n, d, d) without a copy."""
    return matrix.to(columns.dtype).expand(len(columns), -1, -1)


def _lift(matrix: Tensor, block: Block, common: Block) -> Tensor:
    if block == common:
        return matrix
    p, q = block
    copies_p = torch.eye(common[0] // p, dtype=matrix.dtype, device=matrix.device)
    copies_q = torch.eye(common[1] // q, dtype=matrix.dtype, device=matrix.device)
    small = rearrange(matrix, "(p q) (r s) -> p q r s", p=p, r=p)
    lifted = einsum(copies_p, copies_q, small, "a c, b d, p q r s -> a p b q c r d s")
    return rearrange(lifted, "a p b q c r d s -> (a p b q) (c r d s)")


def _decompose(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (d,) in descending order and right-singular vectors (d, d), one a row, from the Gram matrix."""
    squares = gram(rows)
    if not torch.isfinite(squares).all():
        raise ValueError("the base weight holds values that are not finite: no atoms can be fitted to it")
    values, vectors = torch.linalg.eigh(squares)  # ascending, one vector a column
    return values.clamp(min=0).sqrt().flip(0), vectors.T.flip(0)


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: entry (f, x) is sqrt(2 / n) cos(pi (x + 1/2) f / n), the first row sqrt(1 / n)."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (position + 0.5) * frequency / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _check_num_atoms(num_atoms: int, size: int) -> None:
    if not 1 <= num_atoms <= size:
        raise ValueError(f"num_atoms={num_atoms}, but a block of {size} numbers has 1 to {size} orthonormal atoms")
