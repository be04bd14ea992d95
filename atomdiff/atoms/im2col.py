"""Convolutions by im2col: the kernels' update mixes the unfolded patches of the input, that of channels the weight.

(W (I + S)) * x = W * (patches of x mixed by (I + S).T), so that samples with updates of their own share one weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.atoms.batched import multiply_per_sample
from atomdiff.atoms.merge import are_separable, separate
from atomdiff.atoms.update import WeightUpdate
from atomdiff.utils.functional_call import is_plain, without_autocast


def im2col_is_cheaper(module: nn.Module, updates: Sequence[WeightUpdate], positions: int) -> bool:
    """Whether mixing unfolded patches is possible, and cheaper than a weight for each sample.

    A weight has as many kernels for an input channel as there are output channels, its unfolded patches as many columns
    as there are positions; whichever is less was the faster one on a CPU, too, in layers of the sizes of Stable
    Diffusion 1.5. The updates have a leading axis of samples; positions are those of a sample's input, over all images.
    """
    return (
        is_plain(module, (nn.Conv2d,))
        and isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.out_channels > positions
        and are_separable(updates)
    )


def mixed(patches: Tensor, matrix: Tensor) -> Tensor:
    """(I + S) @ patches for S (..., n, n) and patches (..., n, width); half precision rounds S, but not I + S."""
    matrix = matrix.to(patches.dtype).expand(*patches.shape[:-2], -1, -1)
    every = patches.flatten(0, -3)
    return torch.baddbmm(every, matrix.flatten(0, -3), every).view(patches.shape)


def convolve(module: nn.Conv2d, weight: Tensor, updates: Sequence[WeightUpdate], x: Tensor) -> Tensor:
    """W_b * x_b, with the blocks (I + C_b).T @ B of W, on patches of x_b mixed by (I + S_b).T, in shared products.

    Args:
        module: gives stride, padding and dilation, and the bias.
        weight: (out, in, k, l), the same for all.
        updates: for which `im2col_is_cheaper`.
        x: (samples, images, in, height, width).

    Returns:
        What the module gives, (samples, images, out, height, width).
    """
    kernels, channels = separate(updates) or (None, None)
    side = 1 if channels is None else channels.view.block[1]
    channels_last = rearrange(x, "s g (i q) h w -> (s g) h w (q i)", q=side)  # so that what is unfolded is contiguous
    unfolded = windows(module, channels_last.permute(0, 3, 1, 2))
    sizes = {"g": x.shape[1], "h": unfolded.shape[-2]}
    patches = rearrange(unfolded, "(s g) (q i) k l h w -> s q (g h w) (k l) i", g=sizes["g"], q=side)
    with without_autocast(x):
        if kernels is not None:
            patches = mixed(patches, kernels.matrix[:, None, None])  # matrices (samples, 1, 1, n, n)
    rows = patches.flatten(3)  # (samples, q, g * h * w, n * in / q)
    if channels is None:
        y = functional.linear(rows[:, 0], rearrange(weight, "o i k l -> o (k l i)"), module.bias)
    else:
        y = multiply_per_sample(weight, channels, rows)
        y = y if module.bias is None else y + module.bias.to(y.dtype)
    return rearrange(y, "s (g h w) o -> s g o h w", **sizes)


def output_size(module: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of the output; not above 0 where the kernel is larger than the input (..., height, width)."""
    assert not isinstance(module.padding, str)
    sides = zip(x.shape[-2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    height, width = ((size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in sides)
    return height, width


def windows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Unfold an input (..., height, width), as a view of it padded: (..., k, l, height, width of the output)."""
    return _unfold(module, functional.pad(x, _padding(module)))


def from_windows(module: nn.Conv2d, patches: Tensor, x: Tensor) -> Tensor:
    """The gradient of an input x from that of its `windows`, added up in float32 at least."""
    left, right, top, bottom = _padding(module)
    height, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_zeros(*x.shape[:-2], top + height + bottom, left + width + right, dtype=wide)
    unfolded = _unfold(module, padded)
    for row, column in itertools.product(*map(range, module.kernel_size)):
        unfolded[..., row, column, :, :] += patches[..., row, column, :, :]
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
