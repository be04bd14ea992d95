"""The pass forward and back through an adapted layer, with nothing of the size of a weight kept in between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from atomdiff.atoms import im2col
from atomdiff.atoms.layout import Block, View, as_kernels
from atomdiff.atoms.update import Change, MatrixGradients, adapted_like, parts_of, without_autocast
from atomdiff.utils import functional_call

_NUMBERS_AT_ONCE = 1 << 21  # of a weight: parts that a CPU was fast with, in memory that it has at hand
_FEW = 128  # positions


def fits(module: nn.Module, x: Tensor, *more: Any) -> bool:
    """Whether `call` can take the place of a plain module's own call: a frozen layer, padded with zeros.

    Args:
        module: one that `functional_call.is_plain`.
        x: what it is called with.
        *more: further arguments of the call, such as the output size of a transposed convolution.
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


def call(module: nn.Module, weight: Tensor, changes: Sequence[Change], x: Tensor) -> Tensor:
    """The module's output for x with the weight changed; gradients flow to x and to the changes' matrices.

    Kept for the backward pass: x in the precision of the product, and the matrices. The adapted weight is made again,
    and its gradient is contracted with the base weight to those of the matrices as soon as it is there. Where the taps
    of x are smaller than the weight, kernels mix in them instead, and the channels of blocks in a part of the weight
    after the other.

    Args:
        module: for which `fits` is true.
        weight: the base weight, frozen.
        changes: of the weight.
        x: what the module takes; under autocast in any precision.
    """
    if functional_call.is_autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    kernels = [change.matrix for change in changes if change.view == View()]
    channels = [change for change in changes if change.view != View()]
    block = channels[0].view.block if channels else (1, 1)
    of_each_input = any(matrix.ndim == 3 for matrix in kernels)  # then it matters which of a block's inputs it was
    separable = im2col.are_separable(changes) and not (of_each_input and block[1] > 1)
    by_taps = torch.is_grad_enabled() and _has_small_taps(module, x)  # drawing gives the bits of a merged weight
    with without_autocast(x):
        if by_taps and separable:
            sums = _sum(kernels), _sum([change.matrix for change in channels])
            result: Tensor = _SeparableByTaps.apply(module, block, x, weight, *sums)
        else:
            result = _AdaptedWeight.apply(module, changes, by_taps, x, weight, *[change.matrix for change in changes])
    return result


def _has_small_taps(module: nn.Module, x: Tensor) -> bool:
    """Whether a convolution on a CPU has so few positions that the taps of x are less than two weights.

    Its products then are faster as plain ones of matrices, up to 10 times for the weight's gradient in the layers of
    Stable Diffusion 1.5. A GPU's own are good.
    """
    if not (isinstance(module, nn.Conv2d) and module.groups == 1 and x.is_cpu and x.ndim == 4):
        return False
    size = im2col.output_size(module, x)
    if x.shape[1] != module.in_channels or min(size) < 1:  # the module says what is wrong
        return False
    return 0 < len(x) * math.prod(size) < 2 * module.out_channels


class _AdaptedWeight(torch.autograd.Function):
    """module(x) with the adapted weight."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, changes: Sequence[Change], by_taps: bool, x: Tensor, weight: Tensor, *matrices: Tensor
    ) -> Tensor:
        ctx.module, ctx.by_taps = module, by_taps
        ctx.changes = [replace(change, matrix=matrix) for change, matrix in zip(changes, matrices, strict=True)]
        ctx.save_for_backward(x, weight)
        adapted = adapted_like(weight, ctx.changes, x.dtype)
        if by_taps:
            return _output(module, adapted.flatten(1) @ _columns(module, x).flatten(0, 2), x)
        return functional_call.call(module, adapted, None if module.bias is None else module.bias.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad[3], any(ctx.needs_input_grad[5:])
        matrices: list[Tensor] | list[None] = [None] * len(ctx.changes)
        with without_autocast(x):
            # A convolution asks for a weight even where only the weight's gradient is wanted.
            adapted = adapted_like(weight, ctx.changes, x.dtype) if wants[0] else weight.to(x.dtype)
            gradients = _gradients_by_taps if ctx.by_taps else _gradients
            of_x, of_weight = gradients(ctx.module, gradient, x, adapted, wants)
            del adapted
            if of_weight is not None:
                found = MatrixGradients(ctx.changes, math.prod(weight.shape[2:]))
                for part in parts_of(weight, ctx.changes):
                    found.add(weight[part], of_weight[part], part)
                matrices = found.result()
        return None, None, None, of_x, None, *matrices


class _SeparableByTaps(torch.autograd.Function):
    """((I + C).T @ W @ (I + S)) * x: I + S makes other taps of those of x, C changes W a part after the other."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, block: Block, x: Tensor, weight: Tensor, kernels: Tensor | None, channels: Tensor | None
    ) -> Tensor:
        ctx.module, ctx.block = module, block
        ctx.save_for_backward(x, weight, kernels, channels)
        columns = _mixed(_columns(module, x, block), kernels)
        y: Any = 0
        for part, _, adapted in _parts(weight, channels, block, x.dtype):
            y = y + _wide(adapted @ columns[:, part].flatten(0, 2))
        return _output(module, y.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, kernels, channels = ctx.saved_tensors
        with without_autocast(x):
            columns = _columns(ctx.module, x, ctx.block)
            mixed = columns if channels is None else _mixed(columns, kernels)
            of_y = rearrange(gradient, "b o h w -> o (b h w)")
            of_parts = []
            of_channels = None if channels is None else torch.zeros_like(channels)
            of_weight: Tensor | None = None
            for part, blocks, adapted in _parts(weight, channels, ctx.block, x.dtype):
                of_parts.append(_transposed_product(adapted, of_y).view(mixed[:, part].shape))
                if of_channels is not None:
                    of_weight = torch.mm(of_y, mixed[:, part].flatten(0, 2).T, out=of_weight)
                    of_channels += _product(blocks, of_weight.view(blocks.shape)).sum(dim=0)
            of_mixed = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts, dim=1)
            of_kernels = None
            if kernels is not None:
                each = rearrange(_product(of_mixed, columns), "q i n m -> (i q) n m")
                of_kernels = each if kernels.ndim == 3 else each.sum(dim=0)
                of_mixed = _mixed(of_mixed, kernels.mT)
            of_x = _from_columns(ctx.module, of_mixed, x) if ctx.needs_input_grad[2] else None
        return None, None, of_x, None, of_kernels, of_channels


def _parts(
    weight: Tensor, channels: Tensor | None, block: Block, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the inputs, i of the q in a block, each with the blocks of W and with those adapted, as rows of outputs.

    Yields:
        A part of the (in / q) inputs, blocks (out / p, p * q, i * n) and rows (out, q * i * n).
    """
    if channels is None:
        rows = weight.flatten(1).to(dtype)
        yield slice(None), rows, rows
        return
    p, q = block
    inputs = weight.shape[1] // q
    most = max(_NUMBERS_AT_ONCE * inputs // weight.numel(), 1)
    size = max(count for count in range(1, min(most, inputs) + 1) if inputs % count == 0)
    matrix = channels.mT.to(dtype).expand(len(weight) // p, -1, -1)
    kernels = rearrange(as_kernels(weight), "(o p) (i q) n -> o p q i n", p=p, q=q)
    blocks, adapted = weight.new_empty(2, len(matrix), p * q, size * kernels.shape[-1], dtype=dtype)  # for all parts
    for first in range(0, inputs, size):
        part = kernels[..., first : first + size, :]
        blocks.view(part.shape).copy_(part)
        torch.baddbmm(blocks, matrix, blocks, out=adapted)
        yield slice(first, first + size), blocks, adapted.view(len(weight), -1)


def _gradients(
    module: Any, gradient: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, each if it is wanted."""
    if isinstance(module, nn.Linear):
        rows = gradient.flatten(0, -2)
        return gradient @ weight if wants[0] else None, rows.T @ x.flatten(0, -2) if wants[1] else None
    settings = module.stride, module.padding, module.dilation, module.transposed, module.output_padding, module.groups
    found = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, (*wants, False))
    return found[0], found[1]


def _gradients_by_taps(
    module: nn.Conv2d, gradient: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """What `_gradients` gives, from products of matrices."""
    columns, of_y = _columns(module, x), rearrange(gradient, "b o h w -> o (b h w)")
    of_columns = _transposed_product(weight.flatten(1), of_y).view(columns.shape) if wants[0] else None
    of_weight = (of_y @ columns.flatten(0, 2).T).view(weight.shape) if wants[1] else None
    return None if of_columns is None else _from_columns(module, of_columns, x), of_weight


def _columns(module: nn.Conv2d, x: Tensor, block: Block = (1, 1)) -> Tensor:
    """The taps of x, gathered by place in a block: (batch, in, height, width) -> (q, in / q, n, positions)."""
    return rearrange(im2col.windows(module, x), "b (i q) k l h w -> q i (k l) (b h w)", q=block[1])


def _from_columns(module: nn.Conv2d, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of its `_columns`."""
    sides = dict(zip("bklhw", (len(x), *module.kernel_size, *im2col.output_size(module, x)), strict=True))
    return im2col.from_windows(module, rearrange(gradient, "q i (k l) (b h w) -> b (i q) k l h w", **sides), x)


def _mixed(columns: Tensor, kernels: Tensor | None) -> Tensor:
    """Columns whose taps kernels mix: all in the same way (n, n), or those of each input in their own (in, n, n)."""
    if kernels is not None and kernels.ndim == 3:
        kernels = rearrange(kernels, "(i q) n m -> q i n m", q=len(columns))
    return columns if kernels is None else im2col.mixed(columns, kernels)


def _output(module: nn.Conv2d, y: Tensor, x: Tensor) -> Tensor:
    """What a convolution gives, from its product (out, positions)."""
    y = rearrange(y, "o (b h w) -> b o h w", b=len(x), h=im2col.output_size(module, x)[0]).contiguous()
    return y if module.bias is None else y + module.bias.to(y.dtype)[:, None, None]


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """The product left.T @ right; a CPU reads a large matrix on the left faster as it lies in memory."""
    return left.T @ right if right.shape[1] > _FEW else (right.T @ left).T.contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product left @ right.mT in float32 at least; float16 is made wider before, as it ends at 65504."""
    if left.dtype == torch.float16:
        left, right = left.float(), right.float()
    return _wide(left @ right.mT)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(matrices: Sequence[Tensor]) -> Tensor | None:
    return reduce(torch.add, matrices) if matrices else None
