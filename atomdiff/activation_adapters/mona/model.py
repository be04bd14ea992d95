"""The PEFT tuner of Mona."""

from __future__ import annotations

from typing import Any

from torch import nn

from atomdiff.activation_adapters.model import ActivationModel, device_of
from atomdiff.activation_adapters.mona.blocks import KNOWN_BLOCKS, find_block
from atomdiff.activation_adapters.mona.config import MonaConfig
from atomdiff.activation_adapters.mona.layer import MonaAdapter, MonaLayer
from atomdiff.tuner.slots import add_slot


class MonaModel(ActivationModel):
    """Adds Mona adapters to blocks; use it by `get_peft_model(model, MonaConfig())` or `model.add_adapter(...)`."""

    prefix = "mona_"
    tuner_layer_cls = MonaLayer

    def why_not(self, config: MonaConfig, module: nn.Module, model: nn.Module) -> str:
        """Why a module is no block that Mona can adapt; empty: it is."""
        block = find_block(module)
        if block is None:
            return f"it is a {type(module).__name__}, expected a block ({', '.join(KNOWN_BLOCKS)})"
        if block.prefix is not None and not hasattr(getattr(model, "config", None), "patch_size"):
            return "its model has no config with image_size and patch_size, by which tokens lie in an image"
        return block.why_not(module)

    def has_place(self, config: MonaConfig, path: str, module: nn.Module) -> bool:
        """Whether a slot of a block is not excluded."""
        return bool(_places(config, path, module))

    def add_to(
        self, config: MonaConfig, adapter_name: str, path: str, module: nn.Module, parent: nn.Module
    ) -> list[MonaLayer]:
        """Add an adapter to each slot of a block."""
        block: Any = find_block(module)
        layers = []
        for name, channels in _places(config, path, module).items():
            layer = add_slot(module, name, block.run)
            if not isinstance(layer, MonaLayer):
                layer = MonaLayer(layer, block.layout(self.model))
                module.add_module(name, layer)
            layer.add_adapter(adapter_name, MonaAdapter(channels, config), device_of(module), config.inference_mode)
            layers.append(layer)
        return layers


def _places(config: MonaConfig, path: str, module: nn.Module) -> dict[str, int]:
    """The slots of a block that are not excluded, with their numbers of channels."""
    block: Any = find_block(module)
    return {name: size for name, size in block.slots(module).items() if not config.excludes(f"{path}.{name}")}
