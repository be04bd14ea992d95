"""The pass forward and back through an adapted layer, with nothing of the size of a weight kept in between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from atomdiff.atoms import Change, MatrixGradients, adapted_like, changes_of, parts_of, write_adapted
from atomdiff.blocks import View
from atomdiff.tuner import taps

SUPPORTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def fits(module: nn.Module, x: Tensor, *more: Any) -> bool:
    """Whether `call` can take the place of a module's own call: a frozen layer of PyTorch's own, padded with zeros.

    Args:
        module: the module.
        x: what it is called with.
        *more: further arguments of the call, such as the output size of a transposed convolution.
    """
    if not taps.is_plain(module, SUPPORTED) or more or torch.compiler.is_compiling():
        return False
    same = x.dtype == cast(Tensor, module.weight).dtype or torch.is_autocast_enabled(x.device.type)
    if not (same and x.is_floating_point() and x.ndim >= cast(Tensor, module.weight).ndim):  # batched, and no mistake
        return False
    if isinstance(module, _ConvNd) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def call(module: nn.Module, weight: Tensor, changes: Sequence[Change], x: Tensor) -> Tensor:
    """The module's output for x with the weight changed; gradients flow to x and to the changes' matrices.

    Kept for the backward pass: x in the precision of the product, and the matrices. The adapted weight is made again,
    and its gradient is contracted with the base weight to those of the matrices as soon as it is there. Where kernels
    alone change and the taps of x are smaller than the weight, neither is ever made.

    Args:
        module: for which `fits` is true.
        weight: the base weight, frozen.
        changes: of the weight.
        x: what the module takes; under autocast in any precision.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    matrices = [change.matrix for change in changes]
    by_taps = torch.is_grad_enabled() and _has_small_taps(module, x)
    of_kernels = all(change.view == View() and change.codes is None and change.matrix.ndim == 2 for change in changes)
    with torch.autocast(x.device.type, enabled=False):
        if by_taps and of_kernels:
            result: Tensor = _MixedTaps.apply(module, torch.stack(matrices).sum(dim=0), x, weight)
        else:
            result = _AdaptedWeight.apply(module, changes, by_taps, x, weight, *matrices)
    return result


def _has_small_taps(module: nn.Module, x: Tensor) -> bool:
    """Whether a convolution has fewer positions than output channels, so that the taps of x are less than the weight.

    On a CPU its products then are faster as plain ones of matrices, up to 10 times for the weight's gradient in the
    layers of Stable Diffusion 1.5. A GPU's own are good.
    """
    if not (isinstance(module, nn.Conv2d) and module.groups == 1 and x.is_cpu and x.ndim == 4):
        return False
    positions = len(x) * math.prod(taps.windows(module, x).shape[-2:])
    return 0 < positions < module.out_channels  # where there is none, the module says what is wrong


class _AdaptedWeight(torch.autograd.Function):
    """module(x) with the adapted weight."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, changes: Sequence[Change], by_taps: bool, x: Tensor, weight: Tensor, *matrices: Tensor
    ) -> Tensor:
        changes = [replace(change, matrix=matrix) for change, matrix in zip(changes, matrices, strict=True)]
        ctx.module, ctx.changes, ctx.by_taps = module, changes, by_taps
        ctx.save_for_backward(x, weight)
        if not by_taps:
            return _with_weight(module, adapted_like(weight, changes, x.dtype), x)
        of_taps = _taps(module, x)
        y = [_product(adapted, of_taps) for _, adapted in _adapted_parts(weight, changes, x.dtype)]
        return _output(module, torch.cat(y, dim=1), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wants = ctx.needs_input_grad[3], any(ctx.needs_input_grad[5:])
        matrices = MatrixGradients(ctx.changes, math.prod(ctx.module.weight.shape[2:]))
        through = _back_by_taps if ctx.by_taps else _back
        with torch.autocast(gradient.device.type, enabled=False):
            of_x = through(ctx, gradient, wants, matrices)
            of_matrices = matrices.result() if wants[1] else [None] * len(ctx.changes)
        return None, None, None, of_x, None, *of_matrices


class _MixedTaps(torch.autograd.Function):
    """(W (I + S)) * x as one product of W with the taps of x, of which I + S makes others.

    Back, one product of W with the gradient gives both what flows on to x and the gradient of S.
    """

    @staticmethod
    def forward(ctx: Any, module: Any, matrix: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(matrix, x, weight)
        return _output(module, _product(weight.to(x.dtype), taps.mixed(_taps(module, x), matrix)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        matrix, x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            of_mixed = _taps_gradient(weight.to(x.dtype), gradient)
            of_matrix = (of_mixed @ _taps(ctx.module, x).mT).sum(dim=(0, 1), dtype=matrix.dtype)
            of_x = None
            if ctx.needs_input_grad[2]:
                of_x = _from_taps(ctx.module, taps.mixed(of_mixed, matrix.T), x)
        return None, of_matrix, of_x, None


def _with_weight(module: nn.Module, weight: Tensor, x: Tensor) -> Any:
    tensors = {"weight": weight}
    if isinstance(module.bias, Tensor):
        tensors["bias"] = module.bias.to(x.dtype)
    return functional_call(module, tensors, (x,))


def _back(ctx: Any, gradient: Tensor, wants: tuple[bool, bool], matrices: MatrixGradients) -> Tensor | None:
    """Return the gradient of x and add that of the weight to those of the matrices, each if it is wanted."""
    x, weight = ctx.saved_tensors
    # A convolution asks for a weight even where only the weight's gradient is wanted.
    adapted = adapted_like(weight, ctx.changes, x.dtype) if wants[0] else weight.to(x.dtype)
    of_x, of_weight = _gradients(ctx.module, gradient, x, adapted, wants)
    del adapted
    if of_weight is not None:
        for part in parts_of(weight, ctx.changes):
            matrices.add(weight[part], of_weight[part], part)
    return of_x


def _gradients(
    module: Any, gradient: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(module, nn.Linear):
        rows = gradient.flatten(0, -2)
        return gradient @ weight if wants[0] else None, rows.T @ x.flatten(0, -2) if wants[1] else None
    settings = module.stride, module.padding, module.dilation, module.transposed, module.output_padding, module.groups
    found = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, (*wants, False))
    return found[0], found[1]


def _back_by_taps(ctx: Any, gradient: Tensor, wants: tuple[bool, bool], matrices: MatrixGradients) -> Tensor | None:
    """What `_back` does, a part of the weight at a time: neither it nor its gradient is ever there as a whole."""
    x, weight = ctx.saved_tensors
    of_taps: Any = 0
    columns = rearrange(_taps(ctx.module, x), "b i n p -> (b p) (i n)") if wants[1] else None
    for part, adapted in _adapted_parts(weight, ctx.changes, x.dtype):
        of_part = gradient[:, part]
        if wants[0]:
            of_taps = of_taps + _taps_gradient(adapted, of_part).to(torch.promote_types(x.dtype, torch.float32))
        if columns is not None:
            of_weight = (rearrange(of_part, "b o h w -> o (b h w)") @ columns).view(adapted.shape)
            matrices.add(weight[part], of_weight, part)
    return _from_taps(ctx.module, of_taps, x) if wants[0] else None


def _adapted_parts(weight: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the first axis with the adapted weight of each; one memory serves all."""
    memory: Tensor | None = None
    for part in parts_of(weight, changes):
        of_part = weight[part]
        if memory is None:
            memory = torch.empty_like(of_part, dtype=dtype)
        write_adapted(memory[: len(of_part)], of_part, changes_of(changes, part))
        yield part, memory[: len(of_part)]


def _taps(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What each kernel position meets: (batch, in, height, width) -> (batch, in, n, positions of the output)."""
    return rearrange(taps.windows(module, x), "b i k l h w -> b i (k l) (h w)")


def _product(weight: Tensor, of_taps: Tensor) -> Tensor:
    """(out, in, ...) times taps (batch, in, n, positions) -> (batch, out, positions)."""
    return weight.flatten(1) @ of_taps.flatten(1, 2)


def _output(module: nn.Conv2d, y: Tensor, x: Tensor) -> Tensor:
    """What a convolution gives, from its product (batch, out, positions)."""
    y = y.unflatten(2, taps.windows(module, x).shape[-2:])
    return y if module.bias is None else y + module.bias.to(y.dtype)[:, None, None]


def _taps_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of taps (batch, in, n, positions) from that of the output (batch, out, height, width)."""
    return (weight.flatten(1).T @ gradient.flatten(2)).unflatten(1, (weight.shape[1], -1))


def _from_taps(module: nn.Conv2d, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of its taps (batch, in, n, positions), added up in float32."""
    names = ("kernel_size", "dilation", "padding", "stride")
    windows: dict[str, Any] = {name: getattr(module, name) for name in names}
    wide = gradient.flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    return functional.fold(wide, x.shape[2:], **windows).to(x.dtype)
