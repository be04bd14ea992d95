"""Convolutions whose rows have kernels of their own, by mixing the taps of the input in place of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.atoms import Change
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
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(change.view == View() and change.codes is None and change.matrix.ndim == 3 for change in changes)
        and module.out_channels > positions
    )


def convolve(module: nn.Conv2d, weight: Tensor, matrices: Tensor, x: Tensor) -> Tensor:
    """(W (I + S_b)) * x_b = W * (taps of x_b mixed by (I + S_b).T), with one product for the whole batch.

    Args:
        module: gives stride, padding and dilation, and the bias.
        weight: (out, in, k, l), the same for all.
        matrices: S (batch, k * l, k * l).
        x: (batch, in, height, width).

    Returns:
        What the module gives, (batch, out, height, width).
    """
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    assert not isinstance(padding, str)
    taps = functional.unfold(x, kernel, dilation, padding, stride).unflatten(1, (module.in_channels, -1))
    height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    with torch.autocast(x.device.type, enabled=False):
        wide = matrices.to(torch.promote_types(taps.dtype, matrices.dtype))
        identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
        mixed = (identity + wide).to(taps.dtype)[:, None] @ taps  # (batch, in, k * l, positions)
    columns = mixed.flatten(1, 2).unflatten(2, (height, -1))
    return functional.conv2d(columns, weight.reshape(len(weight), -1, 1, 1), module.bias)
