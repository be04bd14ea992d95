"""Batches whose samples have weights of their own: all adapted weights, or their products with the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.func import vmap

from atomdiff.atoms.layout import as_kernels
from atomdiff.atoms.merge import (
    HALF,
    adapt_wide,
    are_separable,
    identity,
    multiply_rows,
    parts_of,
    row_factor,
    separate,
    updates_of_part,
)
from atomdiff.atoms.update import WeightUpdate
from atomdiff.utils.functional_call import without_autocast

_PART_BYTES = 24 << 20  # of weights: enough for a fast product, and what a CPU's allocator keeps for the next


def adapt_weight_per_sample(weight: Tensor, updates: Sequence[WeightUpdate]) -> Tensor:
    """An adapted weight for each sample: (out, in/groups, ...) -> (samples, out, in/groups, ...).

    The matrices of the updates have a leading axis of samples.
    """
    if not updates:
        raise ValueError("no update to make: use the weight itself")
    samples = len(updates[0].matrix)
    matrices = tuple(update.matrix for update in updates)
    adapted = weight.new_empty(samples, *weight.shape)
    for part in parts_of(weight, updates, samples):
        adapted[:, part] = vmap(partial(_adapt, weight[part], updates_of_part(updates, part)))(*matrices)
    return adapted


def can_adapt_in_turn(weight: Tensor, updates: Sequence[WeightUpdate]) -> bool:
    """Whether `adapt_in_turn` takes these, on a CPU, where it is faster; no gradient may be wanted."""
    possible = are_separable(updates) and (weight.dtype not in HALF or all(u.view.spans_kernel for u in updates))
    return possible and weight.is_cpu and weight.is_contiguous() and not torch.is_grad_enabled()


def adapt_in_turn(weight: Tensor, updates: Sequence[WeightUpdate]) -> Iterator[Tensor]:
    """The weights of `adapt_weight_per_sample` one after another, in the same memory: use one before the next is made.

    What only has to be done once is done for all samples: the channels of blocks are gathered, small matrices are made.
    """
    kernels, channels = separate(updates) or (None, None)
    source, adapted = as_kernels(weight), torch.empty_like(weight)
    goal = as_kernels(adapted)
    if kernels is not None:
        of_kernels = row_factor(kernels.matrix, source)
    if channels is not None:
        p, q = channels.view.block
        source = rearrange(source, "(o p) (i q) n -> o (p q) i n", p=p, q=q)
        blocks = source.flatten(2)
        of_channels = channels.matrix.mT.to(weight.dtype)
        of_channels = identity(p * q, of_channels) + of_channels
    for sample in range(len(updates[0].matrix)):
        with without_autocast(weight):
            rows = source if channels is None else torch.matmul(of_channels[sample], blocks).view(source.shape)
            if kernels is not None:
                rows = multiply_rows(rows, of_kernels[sample], goal if channels is None else None)
            if channels is not None:
                goal.copy_(rearrange(rows, "o (p q) i n -> (o p) (i q) n", p=p))
        yield adapted


def _adapt(weight: Tensor, updates: Sequence[WeightUpdate], *matrices: Tensor) -> Tensor:
    """The adapted weight of one sample, which has these matrices."""
    return adapt_wide(weight, [replace(update, matrix=m) for update, m in zip(updates, matrices, strict=True)])


def multiply_per_sample(weight: Tensor, update: WeightUpdate, rows: Tensor) -> Tensor:
    """Rows of each sample times its own weight, the channels of whose blocks are updated.

    The adapted weights, which may take more memory than all else, are there in parts only, and in the order in which
    one product gives them for all samples. In half precision it adds up I @ X and C.T @ X, so as not to round I + C.

    Args:
        weight: (out, in, ...).
        update: of channels, without coefficients, with a leading axis of samples.
        rows: (samples, q, width, n * in / q), inputs gathered by their place in a block, those of a position together.

    Returns:
        (samples, width, out).
    """
    p, q = update.view.block
    samples, is_half = len(rows), weight.dtype in HALF
    with without_autocast(weight):
        matrix = update.matrix.to(weight.dtype)
        one = identity(p * q, matrix)
        both = torch.cat([matrix, one.expand_as(matrix)], dim=1) if is_half else one + matrix
        factor = rearrange(both, "s d (p q) -> (s q p) d", p=p)
    size = max(_PART_BYTES // (samples * weight[0].numel() * p * weight.element_size()), 1) * p
    parts = as_kernels(weight).split(size if weight.is_cpu else len(weight))
    memory = None if torch.is_grad_enabled() else weight.new_empty(samples * parts[0].numel())  # new pages cost time
    products = []
    for part in parts:
        goal = None if memory is None else memory[: samples * part.numel()].view(len(factor), -1)
        with without_autocast(weight):
            blocks = rearrange(part, "(o p) (i q) n -> (p q) (o n i)", p=p, q=q)
            adapted = torch.mm(factor, torch.cat([blocks, blocks]) if is_half else blocks, out=goal)
        adapted = rearrange(adapted, "(s q p) (o k) -> (s q) k (p o)", s=samples, q=q, k=rows.shape[3])
        product = torch.bmm(rows.flatten(0, 1), adapted)
        products.append(reduce(product, "(s q) w (p o) -> s w (o p)", "sum", s=samples, p=p))
    return torch.cat(products, dim=2)
