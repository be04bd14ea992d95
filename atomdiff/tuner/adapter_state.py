"""Which adapters of any PEFT method a model has: their layers, configs, tensors and weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from atomdiff.atoms.variants import TENSOR_NAMES
from atomdiff.tuner import weight_access
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.layer_adapters import attribute
from atomdiff.tuner.model import supported_modules
from atomdiff.tuner.shared_state import as_peft_model

_TUNER_PREFIX = "base_model."  # before what layers share
PEFT_PREFIX = f"{_TUNER_PREFIX}model."


def adapter_layers(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Path -> adapter layer of any method, or those with one adapter; outer ones before those that they wrap."""
    layers: dict[str, Any] = {
        path: module for path, module in weight_access.walk(model) if isinstance(module, BaseTunerLayer)
    }
    if name is None:
        return layers
    return {path: layer for path, layer in layers.items() if name in layer._all_available_adapter_names()}


def atom_layers(model: nn.Module) -> dict[str, Any]:
    """Path of the adapted module -> atom layer, for all of a model."""
    return {module_path(path): module for path, module in weight_access.walk(model) if isinstance(module, AtomLayer)}


def other_layers(model: nn.Module) -> list[Any]:
    """The adapter layers of other methods."""
    return [layer for layer in adapter_layers(model).values() if not isinstance(layer, AtomLayer)]


def can_mix(layer: Any) -> bool:
    """Whether a layer can give each sample of a batch its own adapters, by its `mix`."""
    return hasattr(type(layer), "mix")


def mixable_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> adapter layer, for those that `can_mix`."""
    return {path: layer for path, layer in adapter_layers(model).items() if can_mix(layer)}


def changes_weights(layer: Any) -> bool:
    """Whether adapters of a layer change its weight, and not what is computed with it: so that they can be merged."""
    return not getattr(type(layer), "acts_on_activations", False)


def module_path(path: str) -> str:
    """The path of an adapter layer, or of what it wraps, as that of the module without adapters."""
    return path.replace(".base_layer", "")


def belongs_to_adapter(path: str, layers: Container[str]) -> bool:
    """Whether a module, parameter or buffer is one of an adapter's, given the paths of all `adapter_layers`."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in layers and parts[end] != "base_layer" for end in range(1, len(parts)))


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's `state_dict` as it is without adapters, unless some are merged."""
    layers = adapter_layers(model)
    state = model.state_dict()
    return {module_path(path): tensor for path, tensor in state.items() if not belongs_to_adapter(path, layers)}


def is_atoms(config: PeftConfig) -> bool:
    """Whether settings are those of an atom adapter."""
    return isinstance(config, AtomConfig)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The adapters of a model with their settings (a `PeftConfig` each), in the order they came."""
    return dict(getattr(model, "peft_config", {}))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Module path -> weight of every layer that atoms can adapt, as it is without any adapter, merged or not."""
    return {path: BaseWeight(module).read().detach() for path, module in supported_modules(model).items()}


def atom_tensors(model: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """Module path -> deltas and fitted atoms of an atom adapter, by kind."""
    tensors: dict[str, dict[str, Tensor]] = {}
    persistent = model.state_dict()
    for path, layer in adapter_layers(model, name).items():
        if isinstance(layer, AtomLayer):
            for kind in TENSOR_NAMES:
                if f"{path}.{attribute(kind)}.{name}" in persistent:
                    tensors.setdefault(module_path(path), {})[kind] = layer.read_tensor(kind, name).detach()
    return tensors


def peft_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter of any PEFT method, wherever they are kept, under the keys that PEFT saves them with.

    What is out of reach has to be ruled out before (`checks.check_in_reach`).
    """
    wrapped = as_peft_model(model)
    state: dict[str, Tensor] = wrapped.state_dict()
    for key, tensor in state.items():
        path, _, own = key.rpartition(".")
        if name in key.split("."):
            state[key] = weight_access.read(wrapped.get_submodule(path), own, tensor)
    state = get_peft_model_state_dict(wrapped, state, name, save_embedding_layers=False)
    layout = torch.contiguous_format  # copies, as files have no tensors that share memory
    return {unwrapped_key(key): tensor.detach().cpu().clone(memory_format=layout) for key, tensor in state.items()}


def peft_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter where they are, under the keys that PEFT saves them with from this model."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        as_peft_model(model), adapter_name=name, save_embedding_layers=False
    )
    return tensors


def unwrapped_key(key: str) -> str:
    """The key of a tensor as it is where its layer wraps no layers of other adapters, with PEFT's prefix."""
    prefix = "" if key.startswith(_TUNER_PREFIX) else PEFT_PREFIX
    return prefix + re.sub(r"(\.base_layer)+\.", ".", key)


def compute_coefficients(model: nn.Module, name: str) -> None:
    """Work out the sparse coefficients of an adapter now, which takes a while, and not in its first forward pass."""
    for layer in atom_layers(model).values():
        for atoms in layer.atom_sets.get(name, ()):
            layer.coefficients(name, atoms)


def activate(model: nn.Module, names: list[str]) -> None:
    """Make exactly these adapters the active ones in every layer, and enable adapters."""
    with keep_requires_grad(model):
        for layer in adapter_layers(model).values():
            # LN tuning looks up the active adapter, also in layers that do not have it.
            own = layer._all_available_adapter_names() if isinstance(layer, LNTuningLayer) else names
            layer.set_adapter([name for name in names if name in own])
            layer.enable_adapters(True)


def set_weights_of_others(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Give adapters of other methods weights, such as `can_be_weighted` allows; they are not merged."""
    for layer in other_layers(model):
        for name in weights.keys() & set(layer._all_available_adapter_names()):
            set_scale_of(layer, name, weights[name])


def can_be_weighted(model: nn.Module, name: str, weight: float) -> bool:
    """Whether an adapter of another method can have a weight; all can have 1."""
    for layer in adapter_layers(model, name).values() if weight != 1 else ():
        trial = copy.copy(layer)
        if hasattr(layer, "scaling"):
            trial.scaling = dict(layer.scaling)
        if not set_scale_of(trial, name, weight):
            return False
    return True


def set_scale_of(layer: Any, name: str, weight: float) -> bool:
    """Set an adapter's weight; False: its method has none."""
    set_scale: Any = getattr(type(layer), "set_scale", None)
    if set_scale is None or "warn" in set_scale.__code__.co_names:  # such a one does nothing else than to say so
        return False
    try:
        set_scale(layer, name, weight)
    except AttributeError:
        return False
    return True


@contextmanager
def keep_requires_grad(model: nn.Module) -> Iterator[None]:
    """PEFT freezes and unfreezes parameters as it switches adapters; those there now stay as they are."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(flag)
