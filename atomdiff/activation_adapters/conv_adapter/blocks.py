"""The residual blocks that branches go with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from atomdiff.activation_adapters.conv_adapter.layer import ConvAdapterLayer, ConvShape
from atomdiff.tuner.slots import replace_children

SLOT = "conv_branch"


@dataclass(frozen=True)
class ResidualBlock:
    """A kind of residual block."""

    convolutions: Callable[[Any], list[Any]]
    """The convolutions between its input and the sum with the shortcut, in their order."""
    channels: Callable[[Any], tuple[int, int]]
    """Channels of its input and of its output."""
    last: str | None = None
    """Name of the activation that follows the sum; None: there is none."""
    why_not: Callable[[Any], str] = lambda block: ""
    """Why this block cannot be adapted; empty: it can."""

    def shape(self, block: Any) -> ConvShape:
        """The convolution that the branch beside a block has: from its input's channels and size to its output's.

        Its kernel is the largest of the block's, so that both see as far, and its stride that of all of them.
        """
        convolutions = [_bare(each) for each in self.convolutions(block)]
        before, after = self.channels(block)
        kernel = max((each.kernel_size for each in convolutions), key=math.prod)
        stride = tuple(math.prod(each.stride[axis] for each in convolutions) for axis in (0, 1))
        padding = tuple(size // 2 for size in kernel)
        return ConvShape(before, after, kernel, stride, padding, (1, 1), "zeros")


def find_residual_block(module: nn.Module) -> ResidualBlock | None:
    """The kind of residual block that a module is; None: none that is known."""
    kind = type(module)
    return _BLOCKS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")


def run_block(block: Any, cls: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a residual block with branches, which are added to the sum before the last activation."""
    layer = block._modules[SLOT]
    if not isinstance(layer, ConvAdapterLayer) or not layer.acts:
        return cls.forward(block, x, *args, **kwargs)
    kind: Any = find_residual_block(block)
    if kind.last is None:
        return layer.add(x, cls.forward(block, x, *args, **kwargs))
    activation = block._modules[kind.last]
    changed = replace_children(block, cls, **{kind.last: lambda total: activation(layer.add(x, total))})
    output: Tensor = cls.forward(changed, x, *args, **kwargs)
    return output


def _bare(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _resnet_convolutions(block: Any) -> list[Any]:
    return [each.convolution for each in block.layer]


def _resnet_channels(block: Any) -> tuple[int, int]:
    convolutions = [_bare(each) for each in _resnet_convolutions(block)]
    return convolutions[0].in_channels, convolutions[-1].out_channels


def _why_resampled(block: Any) -> str:
    return "" if block.upsample is None and block.downsample is None else "it changes the size of its input"


_RESNET = ResidualBlock(_resnet_convolutions, _resnet_channels, "activation")
_CONVNEXT = ResidualBlock(lambda block: [block.dwconv], lambda block: (_bare(block.dwconv).in_channels,) * 2)
_UNET = ResidualBlock(lambda block: [block.conv1, block.conv2], lambda block: (block.in_channels, block.out_channels))
_BLOCKS = {
    "diffusers.ResnetBlock2D": replace(_UNET, why_not=_why_resampled),
    "transformers.ResNetBasicLayer": _RESNET,
    "transformers.ResNetBottleNeckLayer": _RESNET,
    "transformers.ConvNextLayer": _CONVNEXT,
    "transformers.ConvNextV2Layer": _CONVNEXT,
}
KNOWN_BLOCKS = tuple(name.partition(".")[2] for name in _BLOCKS)
