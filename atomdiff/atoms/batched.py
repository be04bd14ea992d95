"""Batches whose samples have weights of their own: all adapted weights, or their products with the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.func import vmap

from atomdiff.atoms.layout import as_kernels
from atomdiff.atoms.merge import adapt_wide, identity, parts_of, updates_of_part
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


def _adapt(weight: Tensor, updates: Sequence[WeightUpdate], *matrices: Tensor) -> Tensor:
    """The adapted weight of one sample, which has these matrices."""
    return adapt_wide(weight, [replace(update, matrix=m) for update, m in zip(updates, matrices, strict=True)])


def multiply_per_sample(weight: Tensor, update: WeightUpdate, columns: Tensor) -> Tensor:
    """The weight with the channels of its blocks updated for each sample, times columns of that sample.

    The adapted weights, which may take more memory than all else, are there in parts only, and in the order in which
    one product gives them for all samples. It adds up I @ X and C.T @ X, so that half precision does not round I + C.

    Args:
        weight: (out, in, ...).
        update: of channels, without coefficients, with a leading axis of samples.
        columns: (samples, q, in / q * n, width), inputs gathered by their place in a block, each with its n positions.

    Returns:
        (samples, out, width).
    """
    p, q = update.view.block
    samples = len(columns)
    with without_autocast(weight):
        matrix = update.matrix.to(weight.dtype)
        both = torch.cat([matrix, identity(p * q, matrix).expand_as(matrix)], dim=1)  # (samples, 2 * p * q, p * q)
        factor = rearrange(both, "s d (p q) -> (s q p) d", p=p)
    size = max(_PART_BYTES // (samples * weight[0].numel() * p * weight.element_size()), 1) * p
    parts = as_kernels(weight).split(size if weight.is_cpu else len(weight))
    memory = None if torch.is_grad_enabled() else weight.new_empty(samples * parts[0].numel())  # new pages cost time
    products = []
    for part in parts:
        goal = None if memory is None else memory[: samples * part.numel()].view(len(factor), -1)
        with without_autocast(weight):
            blocks = rearrange(part, "(o p) (i q) n -> (p q) (o i n)", p=p, q=q)
            adapted = torch.mm(factor, torch.cat([blocks, blocks]), out=goal)
        adapted = rearrange(adapted, "(s q p) (o k) -> (s q) (p o) k", s=samples, q=q, k=columns.shape[2])
        product = torch.bmm(adapted, columns.flatten(0, 1))
        products.append(reduce(product, "(s q) (p o) w -> s (o p) w", "sum", s=samples, p=p))
    return torch.cat(products, dim=1)
