"""Convolutions whose rows have weights of their own: kernels mix in the taps of the input, channels in the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.atoms import Change, multiply_by_row
from atomdiff.blocks import View


def pays(module: nn.Module, changes: Sequence[Change], positions: int) -> bool:
    """Whether mixing taps is possible, and cheaper than a weight for each row.

    A weight has as many kernels for an input channel as there are output channels, its taps as many columns as there
    are positions; whichever is less was the faster one on a CPU, too, in layers of Stable Diffusion 1.5's sizes.

    Args:
        module: the bare module.
        changes: those of its weight, with a leading axis of rows.
        positions: positions of the input that a row has, over all its images.
    """
    channels = {change.view for change in changes} - {View()}
    return (
        is_plain(module, (nn.Conv2d,))
        and isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(change.codes is None and change.matrix.ndim == 3 for change in changes)
        and len(channels) <= 1
        and not any(view.whole for view in channels)
        and module.out_channels > positions
    )


def is_plain(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a call of the module does what PyTorch's own layer of one of these kinds does, and nothing more."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in kinds and "forward" not in vars(module) and not any(hooks)


def mixed(taps: Tensor, matrix: Tensor) -> Tensor:
    """(I + S) @ taps for S (..., n, n) and taps (..., n, positions); half precision rounds S, but not I + S."""
    return taps + matrix.to(taps.dtype) @ taps


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
    with torch.autocast(x.device.type, enabled=False):
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


def windows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The taps of an input (..., height, width) as a view of it padded: (..., k, l, height, width of the output)."""
    assert not isinstance(module.padding, str)
    windows = functional.pad(x, [pad for side in reversed(module.padding) for pad in (side, side)])
    sides = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(sides, start=x.ndim - 2):
        reach = windows.shape[axis] - dilation * (kernel - 1)
        windows = windows.unfold(axis, reach, dilation)[..., ::stride]
    return windows
