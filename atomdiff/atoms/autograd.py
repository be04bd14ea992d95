"""Memory-efficient autograd of an adapted layer: the backward pass makes a large adapted weight again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from atomdiff.atoms.im2col_autograd import (
    SeparableByIm2col,
    columns_of,
    gradients_by_im2col,
    output_of,
    unfolds_to_little,
)
from atomdiff.atoms.layout import Block
from atomdiff.atoms.merge import adapt_weight_as, adapt_wide, as_one_update, parts_of, separate, updates_of_part
from atomdiff.atoms.update import WeightUpdate
from atomdiff.utils import functional_call
from atomdiff.utils.functional_call import without_autocast


def can_recompute(module: nn.Module, x: Tensor, *more: Any) -> bool:
    """Whether `call` can take the place of a plain module's own call with x: a frozen layer, padded with zeros.

    More arguments, such as the output size of a transposed convolution, rule it out.
    """
    if more or torch.compiler.is_compiling():
        return False
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    same = x.dtype == weight.dtype or functional_call.is_autocast(x)
    if not (same and x.is_floating_point() and x.ndim >= weight.ndim):  # batched, and no mistake
        return False
    if isinstance(module, _ConvNd) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def call(module: nn.Module, weight: Tensor, updates: Sequence[WeightUpdate], x: Tensor) -> Tensor:
    """The module's output for x with the weight updated; gradients flow to x and to the updates' matrices.

    Kept for the backward pass: x in the precision of the product, and the matrices. The adapted weight is made again,
    unless it is small or no larger than x. Its gradient is contracted with the base weight to those of the matrices as
    soon as it is there. Where the unfolded patches of x are smaller than the weight, kernels mix in them instead, and
    the channels of blocks in a part of the weight after the other. The module is one for which `can_recompute` is true.
    """
    if functional_call.is_autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    by_im2col = torch.is_grad_enabled() and unfolds_to_little(module, x)  # generating gives the bits of a merged weight
    with without_autocast(x):
        if by_im2col and (sums := _separable_sums(updates)) is not None:
            block, kernels, channels = sums
            result: Tensor = SeparableByIm2col.apply(module, block, x, weight, kernels, channels)
        else:
            result = _AdaptedWeight.apply(module, updates, by_im2col, x, weight, *[update.matrix for update in updates])
    return result


def _separable_sums(updates: Sequence[WeightUpdate]) -> tuple[Block, Tensor | None, Tensor | None] | None:
    """The block of channels, and the sums of the matrices of kernels and of channels; None: there are other updates."""
    pair = separate(updates)
    if pair is None:
        return None
    kernels, channels = pair
    block = (1, 1) if channels is None else channels.view.block
    if kernels is not None and (kernels.view.block != (1, 1) or (kernels.view.by_input and block[1] > 1)):
        return None  # by input it matters which input of a block it was
    return block, None if kernels is None else kernels.matrix, None if channels is None else channels.matrix


_SMALL_WEIGHT = 1 << 18  # numbers: all layers up to that are 14 MB in Stable Diffusion 1.5, in half precision


class _AdaptedWeight(torch.autograd.Function):
    """module(x) with the adapted weight."""

    @staticmethod
    def forward(
        ctx: Any,
        module: Any,
        updates: Sequence[WeightUpdate],
        by_im2col: bool,
        x: Tensor,
        weight: Tensor,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.module, ctx.by_im2col = module, by_im2col
        ctx.updates = [replace(update, matrix=matrix) for update, matrix in zip(updates, matrices, strict=True)]
        adapted = adapt_weight_as(weight, ctx.updates, x.dtype)
        is_kept = adapted.numel() <= max(x.numel(), _SMALL_WEIGHT)
        ctx.save_for_backward(x, weight, adapted if is_kept else None)
        if by_im2col:
            return output_of(module, adapted.flatten(1) @ columns_of(module, x).flatten(0, 2), x)
        return functional_call.call(module, adapted, None if module.bias is None else module.bias.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, adapted = ctx.saved_tensors
        wants = ctx.needs_input_grad[3], any(ctx.needs_input_grad[5:])
        matrices: list[Tensor] | list[None] = [None] * len(ctx.updates)
        with without_autocast(x):
            # A convolution asks for a weight even where only the weight's gradient is wanted.
            if adapted is None:
                adapted = adapt_weight_as(weight, ctx.updates, x.dtype) if wants[0] else weight.to(x.dtype)
            gradients = gradients_by_im2col if ctx.by_im2col else _gradients
            grad_x, grad_weight = gradients(ctx.module, gradient, x, adapted, wants)
            del adapted
            if grad_weight is not None:
                sums = MatrixGradients(ctx.updates, math.prod(weight.shape[2:]))
                for part in parts_of(weight, ctx.updates):
                    sums.add(weight[part], grad_weight[part], part)
                matrices = sums.result()
        return None, None, None, grad_x, None, *matrices


def _gradients(
    module: Any, gradient: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, each if it is wanted."""
    if isinstance(module, nn.Linear):
        rows = gradient.flatten(0, -2)
        return gradient @ weight if wants[0] else None, rows.T @ x.flatten(0, -2) if wants[1] else None
    settings = module.stride, module.padding, module.dilation, module.transposed, module.output_padding, module.groups
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, (*wants, False))
    return grad_x, grad_weight


_FOLDED_ROW = 36  # numbers in a row that a product of rows is fast with


class MatrixGradients:
    """The gradients of the updates' matrices from that of what `adapt_weight` gives, part by part of the weight.

    Where rows X of one view are all that is updated, X' = X @ T, that is X.T @ (gradient of X') and the small step from
    T to the matrices. Else autograd goes through each part. `positions` are those of a kernel.
    """

    def __init__(self, updates: Sequence[WeightUpdate], positions: int) -> None:
        matrices = [update.matrix.detach() for update in updates]
        self._leaves = [matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices]
        self._leaves = [leaf.requires_grad_() for leaf in self._leaves]
        self._updates = [replace(update, matrix=leaf) for update, leaf in zip(updates, self._leaves, strict=True)]
        with torch.enable_grad():
            self._one = as_one_update(self._updates, positions)
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
            adapted = adapt_wide(weight, updates_of_part(self._updates, part))
        for total, found in zip(
            self._totals, torch.autograd.grad(adapted, self._leaves, gradient.to(adapted.dtype)), strict=True
        ):
            total += found

    def result(self) -> list[Tensor]:
        """The gradients, in float32 at least."""
        if self._one is None or self._one.matrix is self._leaves[0]:
            return self._totals
        return list(torch.autograd.grad(self._one.matrix, self._leaves, self._totals[0]))


def _product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right for rows (n, d) each; short rows are taken several at a time, as such products are slow."""
    size = left.shape[1]
    fold = math.gcd(max(_FOLDED_ROW // size, 1), len(left))
    product = left.reshape(-1, fold * size).T @ right.reshape(-1, fold * size)
    return product.view(fold, size, fold, size).diagonal(dim1=0, dim2=2).sum(dim=-1)
