"""Keep the base parameters of a module aside while adapters are merged into it.

They lie in the base module itself: adapter layers may be taken away by others (`unload_lora_weights`), and the base
must come back all the same.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from atomdiff.tuner import weight_access

_KEPT = "kept_base_"  # buffers, which follow the module to other devices and dtypes and into copies
_STORED = "stored_base_weight"  # what reads the weight from where it takes no memory of the device
_MERGED = "merged_layers"  # layers of other methods than atoms that merged into it, and kept its parameters first


def get(base: nn.Module, name: str = "weight") -> Tensor | None:
    """A kept parameter of a base module; None: it is not kept."""
    return base._buffers.get(_KEPT + name)


def put(base: nn.Module, value: Tensor | None, name: str = "weight") -> None:
    """Keep a parameter of a base module, or with None keep it no more."""
    base._buffers.pop(_KEPT + name, None)
    weight_access.forget_buffer(base, _KEPT + name)
    base._non_persistent_buffers_set.discard(_KEPT + name)
    if value is not None:
        base.register_buffer(_KEPT + name, value, persistent=False)


def get_stored(base: nn.Module) -> Any:
    """What reads the kept weight of a base module from elsewhere; None: nothing does."""
    return vars(base).get(_STORED)


def put_stored(base: nn.Module, stored: Any) -> None:
    """Let something read the weight of a base module from elsewhere, or with None nothing."""
    vars(base).pop(_STORED, None)
    if stored is not None:
        vars(base)[_STORED] = stored


def check_stored(base: nn.Module) -> None:
    """Check that the kept weight of a base module can be read from elsewhere, if it has to be.

    Raises:
        UserError: it cannot.
    """
    if (stored := get_stored(base)) is not None:
        stored.check()


def unmerged(base: nn.Module) -> Tensor:
    """The weight of a base module without what is merged into it, wherever it is kept, as calls compute with it."""
    stored, of_device = get_stored(base), get(base)
    if stored is None:
        return weight_access.read(base) if of_device is None else weight_access.as_computed(base, of_device)
    weight, found = cast(Tensor, base.weight), cast(Tensor, stored())
    return weight_access.as_computed(base, found if weight.is_meta else found.to(weight, non_blocking=True))


def merged_layers(base: nn.Module) -> list[Any]:
    """The layers of other methods than atoms that are merged into a base module whose parameters are kept."""
    return list(vars(base).get(_MERGED, []))


def keep_for(base: nn.Module, layer: Any) -> None:
    """Keep all parameters of a base module before a layer of another method than atoms merges into it."""
    for name, parameter in base.named_parameters(recurse=False):
        if get(base, name) is None and not (name == "weight" and get_stored(base)):
            put(base, parameter.detach().clone(), name)
    layers = vars(base).setdefault(_MERGED, [])
    if layer not in layers:
        layers.append(layer)


def release(base: nn.Module) -> None:
    """Let the layers of other methods act unmerged again, as the weight is about to be written; not so the weight."""
    for layer in vars(base).pop(_MERGED, []):
        layer.merged_adapters.clear()
    for name in [key.removeprefix(_KEPT) for key in base._buffers if key.startswith(_KEPT)]:
        if name != "weight":
            give_back(base, name)


def give_back(base: nn.Module, name: str = "weight") -> None:
    """Copy a kept parameter back, every bit as it was, and keep it no more; without effect where it is not kept."""
    parameter = weight_access.memory(base, name) if base._parameters.get(name) is not None else None
    stored = get_stored(base) if name == "weight" else None
    kept = stored() if stored else get(base, name)
    if parameter is not None and kept is not None:
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            parameter.detach().copy_(kept)
    put(base, None, name)
    if name == "weight":
        put_stored(base, None)


def is_kept(base: nn.Module) -> bool:
    """Whether parameters of a module are kept, or others merged into it."""
    return _MERGED in vars(base) or _STORED in vars(base) or any(key.startswith(_KEPT) for key in base._buffers)
