"""The base weight of a module while adapters are merged into it: kept as a copy beside it, or offloaded.

What is kept lies in the base module itself: adapter layers may be taken away by others (`unload_lora_weights`), and the
base must come back all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from atomdiff.atoms.merge import write_adapted
from atomdiff.atoms.update import WeightUpdate
from atomdiff.tuner import weight_access
from atomdiff.utils.errors import UserError

_COPY = "kept_base_"  # buffers, which follow the module to other devices and dtypes and into copies
_OFFLOADED = "stored_base_weight"
_MERGED = "merged_layers"  # layers of other methods than atoms that merged into it, and kept its parameters first


class BaseWeight:
    """The parameters of a base module without what is merged into it; all that is kept is kept in the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def copy(self) -> Tensor | None:
        """The copy of the weight beside it; None: there is none."""
        return self.module._buffers.get(_COPY + "weight")

    def copy_of(self, name: str) -> Tensor | None:
        """The copy of a parameter beside it; None: there is none."""
        return self.module._buffers.get(_COPY + name)

    def set_copy(self, value: Tensor | None, name: str = "weight") -> None:
        """Keep a copy of a parameter, or with None keep it no more."""
        self.module._buffers.pop(_COPY + name, None)
        weight_access.forget_buffer(self.module, _COPY + name)
        self.module._non_persistent_buffers_set.discard(_COPY + name)
        if value is not None:
            self.module.register_buffer(_COPY + name, value, persistent=False)

    @property
    def offloaded(self) -> Any:
        """What reads the weight from where it takes no memory of the device, when called; None: nothing does."""
        return vars(self.module).get(_OFFLOADED)

    @offloaded.setter
    def offloaded(self, reader: Any) -> None:
        vars(self.module).pop(_OFFLOADED, None)
        if reader is not None:
            vars(self.module)[_OFFLOADED] = reader

    @property
    def is_kept(self) -> bool:
        """Whether parameters are kept, or other methods merged into the module."""
        state = vars(self.module)
        return _MERGED in state or _OFFLOADED in state or any(key.startswith(_COPY) for key in self.module._buffers)

    @property
    def merged_layers(self) -> list[Any]:
        """The layers of other methods than atoms that are merged into the module."""
        return list(vars(self.module).get(_MERGED, []))

    def read(self) -> Tensor:
        """The weight, wherever it is kept, as calls compute with it."""
        offloaded, copy = self.offloaded, self.copy
        if offloaded is None:
            return weight_access.read(self.module) if copy is None else weight_access.as_computed(self.module, copy)
        weight, stored = cast(Tensor, self.module.weight), cast(Tensor, offloaded())
        return weight_access.as_computed(
            self.module, stored if weight.is_meta else stored.to(weight, non_blocking=True)
        )

    def write(self, updates: Sequence[WeightUpdate], offloaded: Any = None) -> None:
        """Write the weight, changed by updates, into the memory that calls read; see `AtomLayer.write`."""
        weight = weight_access.memory(self.module)
        if weight.dtype in weight_access.FLOAT8:
            raise UserError(
                f"weights are stored in {weight.dtype}, to which merged ones would be rounded: use concepts unmerged "
                "(pipe.set_adapters)"
            )
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            self.keep(offloaded)
            write_adapted(weight.detach(), self.read().detach(), [update.to(weight.device) for update in updates])

    def keep(self, offloaded: Any = None) -> None:
        """Keep the weight before it is written: as a copy, if it is not yet, or as what reads it from elsewhere."""
        if offloaded is not None:
            self.set_copy(None)
        elif self.copy is None:
            self.set_copy(self.read().detach().clone())
        self.offloaded = offloaded

    def keep_for(self, layer: Any) -> None:
        """Keep all parameters before a layer of another method than atoms merges into the module."""
        for name, parameter in self.module.named_parameters(recurse=False):
            if self.copy_of(name) is None and not (name == "weight" and self.offloaded):
                self.set_copy(parameter.detach().clone(), name)
        layers = vars(self.module).setdefault(_MERGED, [])
        if layer not in layers:
            layers.append(layer)

    def release(self, layer: Any) -> None:
        """Let a layer of another method act unmerged again, before the weight is written or restored."""
        if layer.merged and not self.is_kept:
            layer.unmerge()  # merged by others, without a copy: as exact as its method can
        layer.merged_adapters.clear()

    def release_layers(self) -> None:
        """Let layers of other methods act unmerged again; restore all but the weight, which is about to be written."""
        for layer in vars(self.module).pop(_MERGED, []):
            layer.merged_adapters.clear()
        for name in [key.removeprefix(_COPY) for key in self.module._buffers if key.startswith(_COPY)]:
            if name != "weight":
                self.restore(name)

    def restore(self, name: str = "weight") -> None:
        """Copy a parameter back, every bit as it was, and keep it no more; without effect where it is not kept."""
        is_there = self.module._parameters.get(name) is not None
        offloaded = self.offloaded if name == "weight" else None
        kept = offloaded() if offloaded else self.copy_of(name)
        if is_there and kept is not None:
            parameter = weight_access.memory(self.module, name)
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.detach().copy_(kept)
        self.set_copy(None, name)
        if name == "weight":
            self.offloaded = None
