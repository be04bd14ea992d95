"""Fit atoms to a weight and apply their change to it.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

A weight seen as rows X (blocks, d) is X = A @ D + residual with m atoms D (m, d). Training changes the atoms only:
X' = X + A @ dD. Orthonormal atoms have A = X @ D.T, so

    X' = X + X @ D.T @ dD = X @ (I + S)        S = D.T @ dD  (d, d)

needs no coefficients at all; those of a sparse code are kept. A row is a kernel, a whole block of p x q kernels
(joint), or the p x q channels of a block at one kernel position. Kernels and channels together are the separable form:
a block, a matrix B (p * q, k * l), becomes (I + C).T @ B @ (I + S). With recursion each input channel i has a dD_i of
its own, and so an S_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.func import vmap

from atomdiff.atoms.layout import View, as_kernels

_ROWS_AT_ONCE = 1 << 16  # so that a large weight is never there in float64 as a whole
_HALF = (torch.float16, torch.bfloat16)
_NUMBERS_AT_ONCE = 1 << 20  # so that a part of a weight stays in the cache
_NUMBERS_AT_ONCE_GPU = 1 << 22  # so that what is there in float32 beside a weight stays small
_FOLDED_ROW = 36  # numbers in a row that a product of rows is fast with
_WIDEST_BLOCK = 256  # numbers in a row up to which one product of whole blocks is cheaper than two of their sides
_BYTES_AT_ONCE = 24 << 20  # of weights by row: enough for a fast product, and what a CPU's allocator keeps for the next


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


def update_matrix(atoms: Tensor, delta: Tensor) -> Tensor:
    """S = D.T @ dD: atoms (m, d), delta (m, d) or (in, m, d) -> (d, d) or (in, d, d), in at least float32."""
    wide = torch.promote_types(delta.dtype, torch.float32)
    return atoms.to(wide).T @ delta.to(wide)


def recursive_delta(mix: Tensor, delta: Tensor) -> Tensor:
    """dD_i[m] = sum over j of beta[i, m, j] * dD1[m, j]: mix (in, m, m1), delta (m, m1, d) -> (in, m, d)."""
    return einsum(mix, delta, "i m j, m j d -> i m d")


@dataclass(frozen=True)
class Change:
    """A change of a weight that is linear in the rows X of a view: X + X @ matrix, or X + A @ matrix with codes A."""

    view: View
    """How the weight is seen as rows."""
    matrix: Tensor
    """(d, d), or (m, d) with codes; with a leading axis one for each input channel."""
    codes: Tensor | None = None
    """Coefficients A as `View.code_columns` arranges them, or None: the rows themselves."""


def without_autocast(tensor: Tensor) -> Any:
    """Within, no autocast on a tensor's device; the meta device knows none."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def adapt_weight(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """The adapted weight: all changes of kernels and whole blocks are added to it, to that all changes of channels.

    For one change of each, without codes, that is (I + C).T @ B @ (I + S) for every block B (p * q, k * l). Matrices of
    the same view are added before the weight is touched. The sums run in float32 at least, and the result is rounded
    once, to the weight's dtype; zero matrices give back the very same values.

    Args:
        weight: (out, in/groups, ...), or (out, in) of a Linear. Never changed.
        changes: in any order.

    Returns:
        A tensor like `weight`, with the same strides.
    """
    adapted = _adapt(weight, changes)
    if adapted.dtype == weight.dtype and adapted.stride() == weight.stride():
        return adapted
    return torch.empty_like(weight, requires_grad=False).copy_(adapted)


def adapt_weight_by_row(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """An adapted weight for each row of a batch: changes with a leading axis of rows -> (rows, out, in/groups, ...)."""
    if not changes:
        raise ValueError("no change to make: use the weight itself")
    rows = len(changes[0].matrix)
    matrices = tuple(change.matrix for change in changes)
    adapted = weight.new_empty(rows, *weight.shape)
    for part in parts_of(weight, changes, rows):
        mine = [_part_of(change, part, by_input=change.matrix.ndim == 4) for change in changes]

        def adapt(*of_row: Tensor, part: slice = part, mine: Sequence[Change] = mine) -> Tensor:
            return _adapt(weight[part], [replace(c, matrix=m) for c, m in zip(mine, of_row, strict=True)])

        adapted[:, part] = vmap(adapt)(*matrices)
    return adapted


def multiply_by_row(weight: Tensor, changes: Sequence[Change], columns: Tensor) -> Tensor:
    """The weight with channels of its blocks changed for each row of a batch, times columns of that row.

    The adapted weights, which may take more memory than all else, are there in parts only, and in the order in which
    one product gives them for all rows. It adds up I @ X and C.T @ X, so that half precision does not round I + C.

    Args:
        weight: (out, in, ...).
        changes: of channels of the same view, without codes, with a leading axis of rows.
        columns: (rows, q, in / q * n, width), inputs gathered by their place in a block, each with its n positions.

    Returns:
        (rows, out, width).
    """
    p, q = changes[0].view.block
    rows = len(columns)
    with without_autocast(weight):
        matrix = torch.stack([change.matrix for change in changes]).sum(dim=0).to(weight.dtype)
        both = torch.cat([matrix, _identity(p * q, matrix).expand_as(matrix)], dim=1)  # (rows, 2 * p * q, p * q)
        factor = rearrange(both, "r d (p q) -> (r q p) d", p=p)
    size = max(_BYTES_AT_ONCE // (rows * weight[0].numel() * p * weight.element_size()), 1) * p
    parts = as_kernels(weight).split(size if weight.is_cpu else len(weight))
    memory = None if torch.is_grad_enabled() else weight.new_empty(rows * parts[0].numel())  # new pages cost time
    products = []
    for part in parts:
        goal = None if memory is None else memory[: rows * part.numel()].view(len(factor), -1)
        with without_autocast(weight):
            blocks = rearrange(part, "(o p) (i q) n -> (p q) (o i n)", p=p, q=q)
            adapted = torch.mm(factor, torch.cat([blocks, blocks]), out=goal)
        adapted = rearrange(adapted, "(r q p) (o k) -> (r q) (p o) k", r=rows, q=q, k=columns.shape[2])
        product = torch.bmm(adapted, columns.flatten(0, 1))
        products.append(reduce(product, "(r q) (p o) w -> r (o p) w", "sum", r=rows, p=p))
    return torch.cat(products, dim=1)


def adapted_like(weight: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """What `adapt_weight` gives, in any precision and without a gradient, as `write_adapted` makes it."""
    out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    write_adapted(out, weight, changes)
    return out


class MatrixGradients:
    """The gradients of the changes' matrices from that of what `adapt_weight` gives, part by part of the weight.

    Where rows X of one view are all that changes, X' = X @ T, that is X.T @ (gradient of X') and the small step from T
    to the matrices. Else autograd goes through each part.

    Args:
        changes: in any order.
        positions: of a kernel.
    """

    def __init__(self, changes: Sequence[Change], positions: int) -> None:
        matrices = [change.matrix.detach() for change in changes]
        self._leaves = [matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices]
        self._leaves = [leaf.requires_grad_() for leaf in self._leaves]
        self._changes = [replace(change, matrix=leaf) for change, leaf in zip(changes, self._leaves, strict=True)]
        with torch.enable_grad():
            self._one = _as_one_change(self._changes, positions)
        sums = self._leaves if self._one is None else [self._one.matrix]
        self._totals = [torch.zeros_like(matrix, requires_grad=False) for matrix in sums]

    def add(self, weight: Tensor, gradient: Tensor, part: slice) -> None:
        """Take in the gradient of a part: both (outputs of the part, in/groups, ...)."""
        if self._one is not None:
            dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype  # float16 ends at 65504
            rows = [self._one.view.rows(tensor.to(dtype)) for tensor in (weight, gradient)]
            self._totals[0] += _product_of_rows(*rows)
            return
        with torch.enable_grad():
            adapted = _adapt(weight, changes_of(self._changes, part))
        for total, found in zip(
            self._totals, torch.autograd.grad(adapted, self._leaves, gradient.to(adapted.dtype)), strict=True
        ):
            total += found

    def result(self) -> list[Tensor]:
        """The gradients, in float32 at least."""
        if self._one is None:
            return self._totals
        return list(torch.autograd.grad(self._one.matrix, self._leaves, self._totals[0]))


def parts_of(weight: Tensor, changes: Sequence[Change], copies: int = 1) -> list[slice]:
    """Parts of the first axis, of whole blocks, of which so many copies stay in a CPU's cache, or small on a GPU."""
    block = math.lcm(*(change.view.block[0] for change in changes))
    at_once = (_NUMBERS_AT_ONCE if weight.is_cpu else _NUMBERS_AT_ONCE_GPU) // (weight[0].numel() * block * copies)
    size = max(at_once, 1) * block
    return [slice(first, min(first + size, len(weight))) for first in range(0, len(weight), size)]


def changes_of(changes: Sequence[Change], part: slice) -> list[Change]:
    """The changes of some outputs."""
    return [_part_of(change, part, by_input=change.matrix.ndim == 3) for change in changes]


def write_adapted(out: Tensor, weight: Tensor, changes: Sequence[Change]) -> None:
    """Write what `adapt_weight` gives into `out`, a tensor of the weight's shape with memory of its own.

    Where kernels alone change, one product writes into `out` at once; half precision then rounds the small matrix, too,
    but not the sum, as it does in small blocks. Else it goes over the first axis in parts that stay in the cache.
    """
    sums = _sum_by_view(changes)
    kernels, goal = as_kernels(weight), as_kernels(out)
    if not sums:
        out.copy_(weight)
    elif out.dtype != weight.dtype:
        for part in parts_of(weight, sums):
            out[part] = adapted_like(weight[part].to(out.dtype), changes_of(sums, part), out.dtype)
    elif len(sums) == 1 and _is_of_kernels(sums[0]) and weight.is_contiguous() and out.is_contiguous():
        _multiply_rows(kernels, sums[0].matrix, goal)
    elif len(sums) == 1 and _is_of_kernels(sums[0]) and kernels.mT.is_contiguous() and goal.mT.is_contiguous():
        _multiply_columns(kernels.mT, sums[0].matrix.mT, goal.mT)
    elif weight.dtype in _HALF and (one := _as_one_change(sums, kernels.shape[2])) is not None:
        factor = one.matrix.to(weight.dtype)
        for part in parts_of(weight, sums):
            rows = one.view.rows(weight[part])
            out[part] = one.view.from_rows(torch.addmm(rows, rows, factor), out[part].shape)
    else:
        for part in parts_of(weight, sums):
            out[part] = adapt_weight(weight[part], changes_of(sums, part))


def _adapt(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """The adapted weight in float32 at least, in any memory layout."""
    wide = as_kernels(weight).to(torch.promote_types(weight.dtype, torch.float32))
    for whole in (True, False):
        wide = _change_rows(wide, [change for change in changes if change.view.whole is whole])
    return wide.reshape(weight.shape)


def _part_of(change: Change, part: slice, by_input: bool) -> Change:
    """The change of some outputs; only codes differ from that of all."""
    if change.codes is None:
        return change
    blocks = slice(part.start // change.view.block[0], part.stop // change.view.block[0])
    return replace(change, codes=change.codes[..., blocks] if by_input else change.codes[blocks])


def _change_rows(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """Add changes to a weight (out, in/groups, n); each acts on the weight as it is before all of them."""
    changed = weight
    for change in _sum_by_view(changes):
        view, by_input = change.view, change.matrix.ndim == 3
        if changed is weight and _is_of_kernels(change) and weight.is_contiguous():
            changed = _multiply_rows(weight, change.matrix)
            continue
        columns = view.columns(changed, by_input)
        source = change.codes
        if source is None:
            source = columns if changed is weight else view.columns(weight, by_input)
        matrix = change.matrix.mT.to(columns.dtype).expand(len(columns), -1, -1)
        mixed = torch.baddbmm(columns, matrix, source.to(columns.dtype))
        changed = view.from_columns(mixed, weight.shape[2], by_input)
    return changed


def _is_of_kernels(change: Change) -> bool:
    return change.view == View() and change.codes is None and change.matrix.ndim == 2


def _as_one_change(changes: Sequence[Change], positions: int) -> Change | None:
    """Changes of kernels and of channels as one of whole blocks: (I + C) x (I + S) - I, a Kronecker product.

    None where there is no such small change: with codes, matrices by input channel, or blocks of several kinds.
    """
    sums = _sum_by_view(changes)
    by_kind = {change.view.whole: change for change in sums}
    if len(by_kind) < len(sums) or any(change.codes is not None or change.matrix.ndim == 3 for change in sums):
        return None
    whole, channels = by_kind.get(True), by_kind.get(False)
    if channels is None:
        return whole
    size = len(channels.matrix) * positions
    if size > _WIDEST_BLOCK or (whole is not None and whole.view != View()):
        return None
    of_kernels = _identity(positions, channels.matrix)
    if whole is not None:
        of_kernels = of_kernels + whole.matrix
    matrix = torch.kron(_identity(len(channels.matrix), channels.matrix) + channels.matrix, of_kernels)
    return Change(View(channels.view.block), matrix - _identity(size, matrix))


def _product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right for rows (n, d) each; short rows are taken several at a time, as such products are slow."""
    size = left.shape[1]
    fold = math.gcd(max(_FOLDED_ROW // size, 1), len(left))
    product = left.reshape(-1, fold * size).T @ right.reshape(-1, fold * size)
    return product.view(fold, size, fold, size).diagonal(dim1=0, dim2=2).sum(dim=-1)


def _multiply_rows(kernels: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """X + X @ matrix for contiguous kernels X (out, in/groups, n).

    Products of so few columns are slow, so that several kernels make one row: as many as was fastest on a CPU, and on a
    GPU eight, which aligns rows.
    """
    wanted = (2 if kernels.dtype == torch.float32 else 1) if kernels.is_cpu else 8
    fold = math.gcd(wanted, kernels.numel() // len(matrix))
    factor = torch.kron(_identity(fold, matrix), matrix).to(kernels.dtype)
    rows = kernels.view(-1, len(factor))
    goal = None if out is None else out.view(rows.shape)
    if kernels.dtype in _HALF:
        mixed = torch.addmm(rows, rows, factor, out=goal)
    else:
        mixed = torch.mm(rows, _identity(len(factor), factor) + factor, out=goal)
    return mixed.view(kernels.shape)


def _multiply_columns(columns: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write X + matrix @ X for kernels that are columns X (out, n, in/groups)."""
    factor = matrix.to(columns.dtype).expand(len(columns), -1, -1)
    if columns.dtype in _HALF:
        torch.baddbmm(columns, factor, columns, out=out)
    else:
        torch.bmm(_identity(len(matrix), factor) + factor, columns, out=out)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _sum_by_view(changes: Sequence[Change]) -> list[Change]:
    sums: dict[View, Tensor] = {}
    for change in changes:
        if change.codes is None:
            before = sums.get(change.view)
            sums[change.view] = change.matrix if before is None else before + change.matrix
    return [Change(view, matrix) for view, matrix in sums.items()] + [c for c in changes if c.codes is not None]


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
