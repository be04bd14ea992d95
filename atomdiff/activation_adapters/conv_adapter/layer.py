"""The branch of Conv-Adapter, and the layer that adds branches to what a convolution or a block has computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.tuner.adapter_scales import BaseAttributes

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """A convolution without its weights and groups."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    padding_mode: str

    @classmethod
    def of(cls, base: Any) -> ConvShape:
        """The shape of a convolution."""
        return cls(**{name: getattr(base, name) for name in cls.__dataclass_fields__})

    @classmethod
    def after(cls, channels: int, other: ConvShape) -> ConvShape:
        """One that keeps channels and size, with the kernel of another."""
        kept = {name: getattr(other, name) for name in ("kernel_size", "dilation", "padding_mode")}
        return cls(channels, channels, stride=(1, 1), padding="same", **kept)


class ConvBranch(nn.Module):
    """A branch of Conv-Adapter (arXiv 2208.07463); zero at first.

    With c input channels, w = c / reduction, it is scale * pointwise(relu(grouped(x))): `grouped` has the kernel,
    stride, padding and dilation of a convolution and w groups of one output channel each, `pointwise` is 1 x 1.
    Neither has a bias. The groups of the convolution itself do not matter.

    Args:
        shape: of the convolution.
        reduction: c / w.
        takes_output: whether it is given what its base has computed, not what its base is given.
    """

    def __init__(self, shape: ConvShape, reduction: int, takes_output: bool = False) -> None:
        super().__init__()
        channels = shape.in_channels
        width = next(
            channels // divisor for divisor in range(min(reduction, channels), channels + 1) if not channels % divisor
        )
        self.grouped = nn.Conv2d(
            channels,
            width,
            shape.kernel_size,
            shape.stride,
            shape.padding,
            shape.dilation,
            groups=width,
            bias=False,
            padding_mode=shape.padding_mode,  # type: ignore[arg-type]
        )
        self.pointwise = nn.Conv2d(width, shape.out_channels, 1, bias=False)
        self.channel_scale = nn.Parameter(torch.ones(shape.out_channels))
        self.takes_output = takes_output
        nn.init.zeros_(self.pointwise.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, height, width) -> what the convolution gives of that shape."""
        return self.channel_scale[:, None, None] * self.pointwise(functional.relu(self.grouped(x)))


class ConvAdapterLayer(BaseAttributes, ActivationLayer):
    """Adds branches to what a convolution, possibly wrapped by layers of other PEFT methods, or a block has computed.

    For a block it stands in a slot, around an `Identity`.
    """

    adapter_layer_names = ("conv_adapter_branch",)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, c, height, width) -> the convolution's output and what the branches add to it."""
        return self.add(x, self.base_layer(x, *args, **kwargs))

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """What was computed from x, with what the branches add, each because of what it takes."""
        added = self.residual(x, output)
        return output if added is None else output + added.to(output.dtype)  # which autocast may have changed
