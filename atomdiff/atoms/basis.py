"""Orthonormal atoms: the singular vectors of a weight's rows, or the discrete cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from atomdiff.utils.float64 import in_float64

_ROWS_AT_ONCE = 1 << 16  # so that a large weight is never there in float64 as a whole


def gram(rows: Tensor) -> Tensor:
    """Gram matrix of rows (blocks, d) in float64: X.T @ X (d, d)."""
    return reduce(torch.add, (wide.T @ wide for wide in map(in_float64, rows.split(_ROWS_AT_ONCE))))


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
    return (atoms * peaks.sign()).to(torch.float32).contiguous().to(rows.device)


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
        raise ValueError(f"num_atoms={num_atoms}, but a block of {size} elements has 1 to {size} orthonormal atoms")
