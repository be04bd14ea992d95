"""Write the updated weight, as fast as memory allows: `atoms.update.updated_weight` in float32 at least, rounded once.

Updates of one view are added before the weight is touched, short rows are multiplied several at a time, and a large
weight is worked on in parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atomdiff.atoms.layout import KERNELS, View, as_kernels
from atomdiff.atoms.update import WeightUpdate

HALF = (torch.float16, torch.bfloat16)
_CPU_PART = 1 << 20  # elements, so that a part of a weight stays in the cache
_GPU_PART = 1 << 22  # so that what is there in float32 beside a weight stays small
_WIDEST_BLOCK = 256  # elements of a row up to which one product of whole blocks is cheaper than two of their sides


def adapt_weight(weight: Tensor, updates: Sequence[WeightUpdate]) -> Tensor:
    """The weight with all updates, as `atoms.update.updated_weight` defines it.

    The sums run in float32 at least, and the result is rounded once, to the weight's dtype; zero matrices give back the
    very same values. It is like the weight, with the same strides; the weight itself is never changed.
    """
    adapted = adapt_wide(weight, updates)
    if adapted.dtype == weight.dtype and adapted.stride() == weight.stride():
        return adapted
    return torch.empty_like(weight, requires_grad=False).copy_(adapted)


def adapt_weight_as(weight: Tensor, updates: Sequence[WeightUpdate], dtype: torch.dtype) -> Tensor:
    """What `adapt_weight` gives, in any precision and without a gradient, as `write_adapted` makes it."""
    out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    write_adapted(out, weight, updates)
    return out


def parts_of(weight: Tensor, updates: Sequence[WeightUpdate], copies: int = 1) -> list[slice]:
    """Parts of the first axis, of whole blocks, of which so many copies stay in a CPU's cache, or small on a GPU."""
    block = math.lcm(*(update.view.block[0] for update in updates))
    at_once = (_CPU_PART if weight.is_cpu else _GPU_PART) // (weight[0].numel() * block * copies)
    size = max(at_once, 1) * block
    return [slice(first, min(first + size, len(weight))) for first in range(0, len(weight), size)]


def write_adapted(out: Tensor, weight: Tensor, updates: Sequence[WeightUpdate]) -> None:
    """Write what `adapt_weight` gives into `out`, a tensor of the weight's shape with memory of its own.

    Where kernels alone are updated, one product writes into `out` at once; half precision then rounds the small matrix,
    too, but not the sum, as it does in small blocks. Else it goes over the first axis in parts that stay in the cache.
    """
    sums = sum_by_view(updates)
    kernels, goal = as_kernels(weight), as_kernels(out)
    if not sums:
        out.copy_(weight)
    elif out.dtype != weight.dtype:
        for part in parts_of(weight, sums):
            out[part] = adapt_weight_as(weight[part].to(out.dtype), updates_of_part(sums, part), out.dtype)
    elif len(sums) == 1 and _is_spatial(sums[0]) and weight.is_contiguous() and out.is_contiguous():
        multiply_rows(kernels, row_factor(sums[0].matrix, kernels), goal)
    elif len(sums) == 1 and _is_spatial(sums[0]) and kernels.mT.is_contiguous() and goal.mT.is_contiguous():
        _multiply_columns(kernels.mT, sums[0].matrix.mT, goal.mT)
    elif weight.dtype in HALF and (one := as_one_update(sums, kernels.shape[2])) is not None:
        factor = one.matrix.to(weight.dtype)
        for part in parts_of(weight, sums):
            rows = one.view.rows(weight[part])
            out[part] = one.view.from_rows(torch.addmm(rows, rows, factor), out[part].shape)
    else:
        for part in parts_of(weight, sums):
            out[part] = adapt_weight(weight[part], updates_of_part(sums, part))


def adapt_wide(weight: Tensor, updates: Sequence[WeightUpdate]) -> Tensor:
    """The adapted weight in float32 at least, in any memory layout."""
    wide = as_kernels(weight).to(torch.promote_types(weight.dtype, torch.float32))
    for spans_kernel in (True, False):
        wide = _update_rows(wide, [update for update in updates if update.view.spans_kernel is spans_kernel])
    return wide.reshape(weight.shape)


def updates_of_part(updates: Sequence[WeightUpdate], part: slice) -> list[WeightUpdate]:
    """The updates of some outputs; only coefficients differ from those of all."""
    return [_of_part(update, part) for update in updates]


def _of_part(update: WeightUpdate, part: slice) -> WeightUpdate:
    if update.coefficients is None:
        return update
    blocks = slice(part.start // update.view.block[0], part.stop // update.view.block[0])
    return replace(update, coefficients=update.coefficients[(..., blocks) if update.view.by_input else blocks])


def _update_rows(weight: Tensor, updates: Sequence[WeightUpdate]) -> Tensor:
    """Add updates to a weight (out, in/groups, n); each acts on the weight as it is before all of them."""
    changed = weight
    for update in sum_by_view(updates):
        view, source = update.view, update.coefficients
        if changed is weight and _is_spatial(update) and weight.is_contiguous():
            changed = multiply_rows(weight, row_factor(update.matrix, weight))
            continue
        columns = view.columns(changed)
        if source is None:
            source = columns if changed is weight else view.columns(weight)
        matrix = update.matrix.mT.to(columns.dtype).expand(len(columns), -1, -1)
        mixed = torch.baddbmm(columns, matrix, source.to(columns.dtype))
        changed = view.from_columns(mixed, weight.shape[2])
    return changed


def _is_spatial(update: WeightUpdate) -> bool:
    """Whether it updates kernels one by one, by a matrix of their positions alone."""
    return update.view == KERNELS and update.coefficients is None


def separate(updates: Sequence[WeightUpdate]) -> tuple[WeightUpdate | None, WeightUpdate | None] | None:
    """The one update of rows that span the kernel, and the one of channels, that these add up to; None: they do not."""
    sums = sum_by_view(updates)
    by_kind = {update.view.spans_kernel: update for update in sums}
    if len(by_kind) < len(sums) or any(update.coefficients is not None for update in sums):
        return None
    return by_kind.get(True), by_kind.get(False)


def are_separable(updates: Sequence[WeightUpdate]) -> bool:
    """Whether they add up to one update of all kernels alike, to one of channels, or to both."""
    pair = separate(updates)
    return pair is not None and (pair[0] is None or pair[0].view == KERNELS)


def as_one_update(updates: Sequence[WeightUpdate], positions: int) -> WeightUpdate | None:
    """Updates of kernels and of channels as one of whole blocks: (I + C) x (I + S) - I, a Kronecker product.

    None where there is no such small matrix: with coefficients, matrices by input channel, or blocks of several kinds.
    """
    kernels, channels = separate(updates) or (None, None)
    if channels is None:
        return None if kernels is None or kernels.view.by_input else kernels
    if kernels is None and positions == 1:
        return channels
    size = len(channels.matrix) * positions
    if size > _WIDEST_BLOCK or (kernels is not None and kernels.view != KERNELS):
        return None
    of_kernels = identity(positions, channels.matrix)
    if kernels is not None:
        of_kernels = of_kernels + kernels.matrix
    matrix = torch.kron(identity(len(channels.matrix), channels.matrix) + channels.matrix, of_kernels)
    return WeightUpdate(View(channels.view.block), matrix - identity(size, matrix))


def row_factor(matrix: Tensor, kernels: Tensor) -> Tensor:
    """What `multiply_rows` multiplies kernels with to add X @ S, for S (..., n, n): I + S, in half precision S.

    Products of n columns are slow, so that several kernels make one row: as many as was fastest on a CPU, and on a GPU
    eight, which aligns rows.
    """
    at_once = (2 if kernels.dtype == torch.float32 else 1) if kernels.is_cpu else 8
    fold = math.gcd(at_once, kernels.numel() // matrix.shape[-1])
    factor = torch.kron(identity(fold, matrix), matrix).to(kernels.dtype)
    return factor if kernels.dtype in HALF else identity(factor.shape[-1], factor) + factor


def multiply_rows(kernels: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """X + X @ S for contiguous kernels X (out, in/groups, n) and the `row_factor` of S."""
    rows = kernels.view(-1, len(factor))
    goal = None if out is None else out.view(rows.shape)
    if kernels.dtype in HALF:
        mixed = torch.addmm(rows, rows, factor, out=goal)
    else:
        mixed = torch.mm(rows, factor, out=goal)
    return mixed.view(kernels.shape)


def _multiply_columns(columns: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write X + matrix @ X for kernels that are columns X (out, n, in/groups)."""
    factor = matrix.to(columns.dtype).expand(len(columns), -1, -1)
    if columns.dtype in HALF:
        torch.baddbmm(columns, factor, columns, out=out)
    else:
        torch.bmm(identity(len(matrix), factor) + factor, columns, out=out)


def identity(size: int, like: Tensor) -> Tensor:
    """The identity matrix (size, size), in the dtype and on the device of a tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def sum_by_view(updates: Sequence[WeightUpdate]) -> list[WeightUpdate]:
    """One update for all of each view, and those with coefficients as they are."""
    if len(updates) < 2:
        return list(updates)
    sums: dict[View, Tensor] = {}
    for update in updates:
        if update.coefficients is None:
            before = sums.get(update.view)
            sums[update.view] = update.matrix if before is None else before + update.matrix
    with_coefficients = [update for update in updates if update.coefficients is not None]
    return [WeightUpdate(view, matrix) for view, matrix in sums.items()] + with_coefficients
