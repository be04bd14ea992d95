"""What layers of several tuners have in common: weights of adapters, and the attributes of the base module."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any


class AdapterScales:
    """What adapter layers have in common whose adapters can be weighted; goes beside PEFT's `BaseTunerLayer`."""

    scaling: dict[str, float]
    active_adapters: list[str]
    _move_adapter_to_device_of_base_layer: Any

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's weight: 0 takes it away, 1 is as trained. A merged weight does not follow."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the weights of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the weights of the active adapters, or without `scale` set them to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    @property
    def r(self) -> dict[str, float]:
        """The adapters of this layer; diffusers counts them by the size of `r`."""
        return self.scaling

    @property
    def lora_A(self) -> dict[str, Any]:  # noqa: N802
        """Adapter -> what moves its tensors by `.to(device)`; diffusers' `set_lora_device` asks LoRA layers for it."""
        move = self._move_adapter_to_device_of_base_layer
        return {name: SimpleNamespace(to=partial(move, name)) for name in self.scaling}

    lora_B = lora_A  # noqa: N815


class BaseAttributes:
    """Gives what a layer itself lacks from its base module: other layers and models ask for `groups`, `stride`.

    It goes before `nn.Module`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)
