"""The PEFT tuner of Conv-Adapter."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atomdiff.activation_adapters.conv_adapter.blocks import KNOWN_BLOCKS, SLOT, find_residual_block, run_block
from atomdiff.activation_adapters.conv_adapter.config import ConvAdapterConfig
from atomdiff.activation_adapters.conv_adapter.layer import ConvAdapterLayer, ConvBranch, ConvShape
from atomdiff.activation_adapters.model import ActivationModel, device_of
from atomdiff.tuner.slots import add_slot


class ConvAdapterModel(ActivationModel):
    """Adds branches to convolutions; use it by `get_peft_model(model, ConvAdapterConfig())` or `add_adapter`."""

    prefix = "conv_adapter_"
    tuner_layer_cls = ConvAdapterLayer

    def why_not(self, config: ConvAdapterConfig, module: nn.Module, model: nn.Module) -> str:
        """Why a module is no convolution, or residual block, that can have a branch; empty: it is."""
        kind = type(module)
        if not config.adapts_blocks:
            return "" if kind is nn.Conv2d else f"it is a {kind.__name__}, expected a Conv2d"
        block = find_residual_block(module)
        return block.why_not(module) if block else f"it is a {kind.__name__}, expected one of {', '.join(KNOWN_BLOCKS)}"

    def in_preset(self, config: ConvAdapterConfig, module: nn.Module) -> bool:
        """Whether the kernel is larger than 1 x 1, or it is a block."""
        return config.adapts_blocks or module.kernel_size != (1, 1)

    def has_place(self, config: ConvAdapterConfig, path: str, module: Any) -> bool:
        """Whether the slot of a block is not excluded."""
        return not (config.adapts_blocks and config.excludes(f"{path}.{SLOT}"))

    def add_to(
        self, config: ConvAdapterConfig, adapter_name: str, path: str, module: Any, parent: nn.Module
    ) -> list[ConvAdapterLayer]:
        """Add a branch to a convolution or a block."""
        block = find_residual_block(module) if config.adapts_blocks else None
        layer = _of_convolution(path, module, parent) if block is None else _of_block(module)
        shape = ConvShape.of(layer.get_base_layer()) if block is None else block.shape(module)
        if config.takes_output:
            shape = ConvShape.after(shape.out_channels, shape)
        branch = ConvBranch(shape, config.reduction, config.takes_output)
        layer.add_adapter(adapter_name, branch, device_of(module), config.inference_mode)
        return [layer]


def _of_convolution(path: str, module: nn.Module, parent: nn.Module) -> Any:
    """The layer around a convolution, possibly below layers of other methods; a new one is the outermost."""
    wrapping = module.modules() if isinstance(module, BaseTunerLayer) else ()
    layer = next((each for each in wrapping if isinstance(each, ConvAdapterLayer)), None)
    if layer is None:
        layer = ConvAdapterLayer(module)
        setattr(parent, path.rpartition(".")[2], layer)
    return layer


def _of_block(module: nn.Module) -> Any:
    """The layer in the slot of a block."""
    layer = add_slot(module, SLOT, run_block)
    if not isinstance(layer, ConvAdapterLayer):
        layer = ConvAdapterLayer(layer)
        module.add_module(SLOT, layer)
    return layer
