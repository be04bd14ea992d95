"""Convolutions whose rows have weights of their own: kernels mix in the taps of the input, channels in the weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.atoms.layout import View
from atomdiff.atoms.update import Change, multiply_by_row, without_autocast
from atomdiff.utils.functional_call import is_plain


def pays(module: nn.Module, changes: Sequence[Change], positions: int) -> bool:
    """Whether mixing taps is possible, and cheaper than a weight for each row.

    A weight has as many kernels for an input channel as there are output channels, its taps as many columns as there
    are positions; whichever is less was the faster one on a CPU, too, in layers of Stable Diffusion 1.5's sizes.

    Args:
        module: the bare module.
        changes: those of its weight, with a leading axis of rows.
        positions: positions of the input that a row has, over all its images.
    """
    return (
        is_plain(module, (nn.Conv2d,))
        and isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and are_separable(changes)
        and all(change.matrix.ndim == 3 for change in changes)
        and module.out_channels > positions
    )


def are_separable(changes: Sequence[Change]) -> bool:
    """Whether kernels, and the channels of blocks of one size, are all that changes, and without codes."""
    blocks = {change.view for change in changes} - {View()}
    return len(blocks) <= 1 and not any(view.whole for view in blocks) and all(c.codes is None for c in changes)


def mixed(taps: Tensor, matrix: Tensor) -> Tensor:
    """(I + S) @ taps for S (..., n, n) and taps (..., n, positions); half precision rounds S, but not I + S."""
    matrix = matrix.to(taps.dtype).expand(*taps.shape[:-2], -1, -1)
    every = taps.flatten(0, -3)
    return torch.baddbmm(every, matrix.flatten(0, -3), every).view(taps.shape)


def convolve(module: nn.Conv2d, weight: Tensor, changes: Sequence[Change], x: Tensor) -> Tensor:
    """W_b * x_b, with the blocks (I + C_b).T @ B of W, on taps of x_b mixed by (I + S_b).T; all rows share products.

    Args:
        module: gives stride, padding and dilation, and the bias.
        weight: (out, in, k, l), the same for all.
        changes: of kernels, and of the channels of blocks of one size, with a leading axis of rows.
        x: (rows, images, in, height, width).

    Returns:
        What the module gives, (rows, images, out, height, width).
    """
    kernels = [change.matrix for change in changes if change.view == View()]
    channels = [change for change in changes if change.view != View()]
    side = channels[0].view.block[1] if channels else 1
    found = windows(module, x)
    images, height, width = len(x[0]), *found.shape[-2:]
    taps = rearrange(found, "r g (i q) k l h w -> r q i (k l) (g h w)", q=side)
    with without_autocast(x):
        if kernels:
            matrix = torch.stack(kernels).sum(dim=0)  # (rows, n, n)
            taps = mixed(taps, matrix[:, None, None])
    if not channels:
        columns = rearrange(taps, "r 1 i n (gh w) -> r (i n) gh w", w=width)
        y = functional.conv2d(columns, weight.reshape(len(weight), -1, 1, 1), module.bias)
        return rearrange(y, "r o (g h) w -> r g o h w", g=images)
    y = multiply_by_row(weight, channels, taps.flatten(2, 3))  # (rows, out, g * h * w)
    y = rearrange(y, "r o (g h w) -> r g o h w", g=images, h=height)
    return y if module.bias is None else y + module.bias.to(y.dtype)[:, None, None]


def output_size(module: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of the output; not above 0 where the kernel is larger than the input (..., height, width)."""
    assert not isinstance(module.padding, str)
    sides = zip(x.shape[-2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    height, width = ((size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in sides)
    return height, width


def windows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The taps of an input (..., height, width) as a view of it padded: (..., k, l, height, width of the output)."""
    return _unfold(module, functional.pad(x, _padding(module)))


def from_windows(module: nn.Conv2d, taps: Tensor, x: Tensor) -> Tensor:
    """The gradient of an input x from that of its `windows`, added up in float32 at least."""
    left, right, top, bottom = _padding(module)
    height, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_zeros(*x.shape[:-2], top + height + bottom, left + width + right, dtype=wide)
    places = _unfold(module, padded)
    for row, column in itertools.product(*map(range, module.kernel_size)):
        places[..., row, column, :, :] += taps[..., row, column, :, :]
    return padded[..., top : top + height, left : left + width].to(x.dtype)


def _padding(module: nn.Conv2d) -> list[int]:
    """As `functional.pad` takes it: both sides of the last axis first."""
    assert not isinstance(module.padding, str)
    return [pad for side in reversed(module.padding) for pad in (side, side)]


def _unfold(module: nn.Conv2d, padded: Tensor) -> Tensor:
    windows = padded
    sides = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(sides, start=padded.ndim - 2):
        reach = padded.shape[axis] - dilation * (kernel - 1)
        windows = windows.unfold(axis, reach, dilation)[..., ::stride]
    return windows
