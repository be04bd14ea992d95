"""Conv-Adapter: a narrow branch beside convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.activation_adapters.model import ActivationModel, device_of
from atomdiff.atoms.variant import check_count
from atomdiff.tuner.adapter_scales import BaseAttributes


@dataclass
class ConvAdapterConfig(ActivationConfig):
    """Conv-Adapter: y = conv(x) + scale * pointwise(relu(grouped(x))), of which the last term is trained.

    Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv 2208.07463.

    Raises:
        ValueError: a field has a value that it may not have.
    """

    METHOD: ClassVar[str] = "CONV_ADAPTER"
    PRESET: ClassVar[str] = "conv"

    reduction: int = field(
        default=4,
        metadata={
            "help": "Input channels to each channel within the branch (the paper's gamma); where it does not divide "
            "their number, the next number above that does."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()
        check_count("reduction", self.reduction)


class ConvBranch(nn.Module):
    """The branch beside a convolution (arXiv 2208.07463); zero at first.

    With c input channels, w = c / reduction, it is scale * pointwise(relu(grouped(x))): `grouped` has the kernel,
    stride, padding and dilation of the convolution and w groups of one output channel each, `pointwise` is 1 x 1.
    Neither has a bias. The groups of the convolution itself do not matter.

    Args:
        base: the convolution.
        reduction: c / w.
    """

    def __init__(self, base: nn.Conv2d, reduction: int) -> None:
        super().__init__()
        channels = base.in_channels
        width = next(
            channels // divisor for divisor in range(min(reduction, channels), channels + 1) if not channels % divisor
        )
        self.grouped = nn.Conv2d(
            channels,
            width,
            base.kernel_size,  # type: ignore[arg-type]
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            groups=width,
            bias=False,
            padding_mode=base.padding_mode,  # type: ignore[arg-type]
        )
        self.pointwise = nn.Conv2d(width, base.out_channels, 1, bias=False)
        self.channel_scale = nn.Parameter(torch.ones(base.out_channels))
        nn.init.zeros_(self.pointwise.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, height, width) -> what the convolution gives of that shape."""
        return self.channel_scale[:, None, None] * self.pointwise(functional.relu(self.grouped(x)))


class ConvAdapterLayer(BaseAttributes, ActivationLayer):
    """A convolution, possibly wrapped by layers of other PEFT methods, with branches beside it."""

    adapter_layer_names = ("conv_adapter_branch",)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, c, height, width) -> the convolution's output and what the branches add to it."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        added = self.residual(x)
        return output if added is None else output + added.to(output.dtype)  # which autocast may have changed


class ConvAdapterModel(ActivationModel):
    """Adds branches to convolutions; use it by `get_peft_model(model, ConvAdapterConfig())` or `add_adapter`."""

    prefix = "conv_adapter_"
    tuner_layer_cls = ConvAdapterLayer

    def why_not(self, module: nn.Module, model: nn.Module) -> str:
        """Why a module is no convolution that can have a branch; empty: it is."""
        return "" if type(module) is nn.Conv2d else f"it is a {type(module).__name__}, expected a Conv2d"

    def in_preset(self, module: nn.Module) -> bool:
        """Whether the kernel is larger than 1 x 1."""
        return module.kernel_size != (1, 1)

    def add_to(
        self, config: ConvAdapterConfig, adapter_name: str, path: str, module: Any, parent: nn.Module
    ) -> list[ConvAdapterLayer]:
        """Add a branch to a convolution."""
        wrapping = module.modules() if isinstance(module, BaseTunerLayer) else ()
        layer = next((each for each in wrapping if isinstance(each, ConvAdapterLayer)), None)
        if layer is None:
            layer = ConvAdapterLayer(module)
            setattr(parent, path.rpartition(".")[2], layer)
        base: Any = layer.get_base_layer()
        layer.add_adapter(adapter_name, ConvBranch(base, config.reduction), device_of(base), config.inference_mode)
        return [layer]
