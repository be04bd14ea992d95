"""The layer of a method that adds to activations: its adapters by name, each times its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_scales import AdapterScales
from atomdiff.tuner.mixed_batch import BatchLayout
from atomdiff.utils.functional_call import is_autocast
from atomdiff.utils.threads import ThreadLocal


class ActivationLayer(nn.Module, AdapterScales, BaseTunerLayer):
    """A module with adapters whose sum, each times its weight, is added to what it computes.

    Args:
        base_layer: the module.
    """

    acts_on_activations = True  # so it is never merged
    other_param_names = ("scaling",)
    adapter_layer_names: tuple[str, ...]
    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._mixed = ThreadLocal()  # while it mixes a batch
        self.train(base_layer.training)

    @property
    def adapters(self) -> Any:
        """The adapters by name."""
        return self._modules[self.adapter_layer_names[0]]

    def add_adapter(self, name: str, adapter: nn.Module, device: torch.device, inference_mode: bool) -> None:
        """Add an adapter with weight 1, on a device."""
        is_empty = any(parameter.is_meta for parameter in adapter.parameters())  # until a file fills it
        adapter.train(self.training)
        self.adapters[name] = adapter if is_empty else adapter.to(device)
        self.scaling[name] = 1.0
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=inference_mode)

    def weights(self, batch: int) -> list[tuple[Any, float | Tensor]]:
        """The adapters that act now, each with its weight, or the weights (batch,) of the samples of a mixed batch."""
        if self._mixed.value is not None:
            layout, weights = self._mixed.value
            own = {name: _spread(layout, of_samples, batch) for name, of_samples in weights.items()}
            return [(self.adapters[name], weight) for name, weight in own.items()]
        if self.disable_adapters:
            return []
        return [(self.adapters[name], self.scaling[name]) for name in self.active_adapters if self.scaling.get(name)]

    @property
    def acts(self) -> bool:
        """Whether there are adapters that act now."""
        if self._mixed.value is not None:
            return bool(self._mixed.value[1])
        return not self.disable_adapters and any(map(self.scaling.get, self.active_adapters))

    def residual(self, x: Tensor, output: Tensor | None = None) -> Tensor | None:
        """What is added (batch, ...); None: nothing.

        Args:
            x: the input (batch, ...) of the module.
            output: what it computes of that (batch, ...), where adapters say by `takes_output` which of both they take.
        """
        total = None
        for adapter, weight in self.weights(len(x)):
            parameter = next(adapter.parameters())
            if parameter.device != x.device and not _is_offloaded(adapter):  # PEFT loads files into the CPU's memory
                adapter.to(x.device)
            taken = output if output is not None and adapter.takes_output else x
            added = adapter(taken if is_autocast(taken) else taken.to(parameter.dtype))
            if isinstance(weight, Tensor):
                weight = weight.to(added).reshape(-1, *[1] * (added.ndim - 1))
            total = weight * added if total is None else total + weight * added
        return None if total is None else total.to(x.dtype)

    @property
    def mixed_batch(self) -> Any:
        """The batch that this thread mixes; None: it mixes none."""
        return self._mixed.value

    @mixed_batch.setter
    def mixed_batch(self, mixed: Any) -> None:
        self._mixed.value = mixed

    def mix(self, layout: BatchLayout, samples: Sequence[Mapping[str, float]], directions: Any = ()) -> None:
        """Let each sample of a batch have adapters of its own, until `mixed_batch` is None again.

        Args:
            layout: how the samples lie in a batch; it may change between calls.
            samples: adapter -> weight, for each sample.
            directions: of atoms, which there are none of here.
        """
        names = [name for name in self.scaling if any(sample.get(name) for sample in samples)]
        self.mixed_batch = layout, {name: torch.tensor([sample.get(name, 0.0) for sample in samples]) for name in names}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no weight that could be merged into.

        Raises:
            ValueError: there are adapters to merge.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if names := [name for name in names if name in self.adapters]:
            raise ValueError(f"what {names[0]!r} adds depends on its input, so there is no weight to merge it into")

    def unmerge(self) -> None:
        """Nothing: nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        if device is not None:
            self.adapters[adapter_name].to(device)


def _is_offloaded(adapter: nn.Module) -> bool:
    """Whether parameters come to where they are needed for the time of calls alone."""
    return any(map(weight_access.is_offloaded, adapter.modules()))


def _spread(layout: BatchLayout, weights: Tensor, batch: int) -> Tensor:
    """Weights of samples (samples,) as those of all that a batch consists of (batch,)."""
    places = layout.split(torch.arange(batch))  # (samples, batch / samples)
    spread = torch.empty(batch)
    spread[places] = weights[:, None].expand_as(places)
    return spread
