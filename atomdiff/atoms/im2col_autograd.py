"""Memory-efficient autograd of convolutions as products of matrices with unfolded patches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atomdiff.atoms import im2col
from atomdiff.atoms.layout import Block, as_kernels
from atomdiff.utils.functional_call import without_autocast

_CPU_PART = 1 << 21  # elements of a weight: parts that a CPU was fast with, in memory that it has at hand
_FEW = 128  # positions


def unfolds_to_little(module: nn.Module, x: Tensor) -> bool:
    """Whether a convolution on a CPU has so few positions that the unfolded patches of x are less than two weights.

    Its products then are faster as plain ones of matrices, up to 10 times for the weight's gradient in the layers of
    Stable Diffusion 1.5. A GPU's own are good.
    """
    if not (isinstance(module, nn.Conv2d) and module.groups == 1 and x.is_cpu and x.ndim == 4):
        return False
    size = im2col.output_size(module, x)
    if x.shape[1] != module.in_channels or min(size) < 1:  # the module says what is wrong
        return False
    return 0 < len(x) * math.prod(size) < 2 * module.out_channels


class SeparableByIm2col(torch.autograd.Function):
    """((I + C).T @ W @ (I + S)) * x: I + S makes other patches of those of x, C updates W a part after the other."""

    @staticmethod
    def forward(
        ctx: Any, module: Any, block: Block, x: Tensor, weight: Tensor, kernels: Tensor | None, channels: Tensor | None
    ) -> Tensor:
        """The product, part by part of the weight."""
        ctx.module, ctx.block = module, block
        ctx.save_for_backward(x, weight, kernels, channels)
        columns = _mixed(columns_of(module, x, block), kernels)
        y: Any = 0
        for part, _, adapted in _parts(weight, channels, block, x.dtype):
            y = y + _wide(adapted @ columns[:, part].flatten(0, 2))
        return output_of(module, y.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradients of x and of both matrices."""
        x, weight, kernels, channels = ctx.saved_tensors
        with without_autocast(x):
            columns = columns_of(ctx.module, x, ctx.block)
            mixed = columns if channels is None else _mixed(columns, kernels)
            grad_y = rearrange(gradient, "b o h w -> o (b h w)")
            grad_parts = []
            grad_channels = None if channels is None else torch.zeros_like(channels)
            grad_weight: Tensor | None = None
            for part, blocks, adapted in _parts(weight, channels, ctx.block, x.dtype):
                grad_parts.append(_transposed_product(adapted, grad_y).view(mixed[:, part].shape))
                if grad_channels is not None:
                    grad_weight = torch.mm(grad_y, mixed[:, part].flatten(0, 2).T, out=grad_weight)
                    grad_channels += _product(blocks, grad_weight.view(blocks.shape)).sum(dim=0)
            grad_mixed = grad_parts[0] if len(grad_parts) == 1 else torch.cat(grad_parts, dim=1)
            grad_kernels = None
            if kernels is not None:
                each = rearrange(_product(grad_mixed, columns), "q i n m -> (i q) n m")
                grad_kernels = each if kernels.ndim == 3 else each.sum(dim=0)
                grad_mixed = _mixed(grad_mixed, kernels.mT)
            grad_x = _from_columns(ctx.module, grad_mixed, x) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, None, grad_kernels, grad_channels


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
    most = max(_CPU_PART * inputs // weight.numel(), 1)
    size = max(count for count in range(1, min(most, inputs) + 1) if inputs % count == 0)
    matrix = channels.mT.to(dtype).expand(len(weight) // p, -1, -1)
    kernels = rearrange(as_kernels(weight), "(o p) (i q) n -> o p q i n", p=p, q=q)
    blocks, adapted = weight.new_empty(2, len(matrix), p * q, size * kernels.shape[-1], dtype=dtype)  # for all parts
    for first in range(0, inputs, size):
        part = kernels[..., first : first + size, :]
        blocks.view(part.shape).copy_(part)
        torch.baddbmm(blocks, matrix, blocks, out=adapted)
        yield slice(first, first + size), blocks, adapted.view(len(weight), -1)


def gradients_by_im2col(
    module: nn.Conv2d, gradient: Tensor, x: Tensor, weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """What `_gradients` gives, from products of matrices."""
    columns, grad_y = columns_of(module, x), rearrange(gradient, "b o h w -> o (b h w)")
    grad_columns = _transposed_product(weight.flatten(1), grad_y).view(columns.shape) if wants[0] else None
    grad_weight = (grad_y @ columns.flatten(0, 2).T).view(weight.shape) if wants[1] else None
    return None if grad_columns is None else _from_columns(module, grad_columns, x), grad_weight


def columns_of(module: nn.Conv2d, x: Tensor, block: Block = (1, 1)) -> Tensor:
    """The patches of x, gathered by place in a block: (batch, in, height, width) -> (q, in / q, n, positions)."""
    return rearrange(im2col.windows(module, x), "b (i q) k l h w -> q i (k l) (b h w)", q=block[1])


def _from_columns(module: nn.Conv2d, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of its `columns_of`."""
    sides = dict(zip("bklhw", (len(x), *module.kernel_size, *im2col.output_size(module, x)), strict=True))
    return im2col.from_windows(module, rearrange(gradient, "q i (k l) (b h w) -> b (i q) k l h w", **sides), x)


def _mixed(columns: Tensor, kernels: Tensor | None) -> Tensor:
    """Columns whose patches kernels mix: all in the same way (n, n), or those of each input in their own (in, n, n)."""
    if kernels is not None and kernels.ndim == 3:
        kernels = rearrange(kernels, "(i q) n m -> q i n m", q=len(columns))
    return columns if kernels is None else im2col.mixed(columns, kernels)


def output_of(module: nn.Conv2d, y: Tensor, x: Tensor) -> Tensor:
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
