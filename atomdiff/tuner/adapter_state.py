"""Which adapters of any PEFT method a model has: their layers, configs, tensors and weights, and checks of these."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from atomdiff.tuner import weight_access
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer, attribute
from atomdiff.tuner.model import base_modules, supported_modules
from atomdiff.tuner.variants import TENSOR_NAMES

PEFT_PREFIX = "base_model.model."


def adapter_layers(model: nn.Module, name: str | None = None) -> list[Any]:
    """The adapter layers of a model, or those with one adapter, outer ones before those that they wrap."""
    layers: list[Any] = [module for _, module in weight_access.walk(model) if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if name is None or name in layer._all_available_adapter_names()]


def atom_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> atom layer, for all of a model."""
    found = {path: module for path, module in weight_access.walk(model) if isinstance(module, AtomLayer)}
    return {path.replace(".base_layer", ""): layer for path, layer in found.items()}


def layers_by_path(model: nn.Module) -> dict[str, Any]:
    """Path -> adapter layer of any method; of several on one module, each with its own path below the outer one's."""
    return {path: module for path, module in weight_access.walk(model) if isinstance(module, BaseTunerLayer)}


def other_layers(model: nn.Module) -> list[Any]:
    """The adapter layers of other methods."""
    return [layer for layer in adapter_layers(model) if not isinstance(layer, AtomLayer)]


def is_atoms(config: PeftConfig) -> bool:
    """Whether settings are those of an atom adapter."""
    return isinstance(config, AtomConfig)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The adapters of a model with their settings (a `PeftConfig` each), in the order they came."""
    return dict(getattr(model, "peft_config", {}))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Module path -> weight of every layer that atoms can adapt, as it is without any adapter, merged or not."""
    return {path: BaseWeight(module).read().detach() for path, module in supported_modules(model).items()}


def check_readable(model: nn.Module, modules: Iterable[str]) -> None:
    """Check that the weights of modules can be read where they are, and that calls use them.

    Raises:
        UserError: one cannot.
    """
    there = dict(base_modules(model))
    weight_access.check_readable(model, [(path, there[path]) for path in modules if path in there])


def check_in_memory(model: nn.Module) -> None:
    """Check that the tensors of atom adapters can be read outside of calls.

    Raises:
        UserError: they cannot.
    """
    layers = atom_layers(model).values()
    weight_access.check_in_memory(model, [layer.tensors(kind) for layer in layers for kind in TENSOR_NAMES])


def check_writable(model: nn.Module) -> None:
    """Check that the weights of all adapted layers can be changed in place.

    Raises:
        UserError: one cannot.
    """
    layers = {
        path.replace(".base_layer", ""): m for path, m in weight_access.walk(model) if isinstance(m, BaseTunerLayer)
    }
    bases = {path: cast(Any, layer).get_base_layer() for path, layer in layers.items()}
    weight_access.check_writable(model, bases.items())
    for base in bases.values():
        BaseWeight(base).check_offloaded()


def check_restorable(model: nn.Module) -> None:
    """Check that all weights that are merged can be given back.

    Raises:
        UserError: one cannot.
    """
    bases = [(path.replace(".base_layer", ""), m) for path, m in weight_access.walk(model) if BaseWeight(m).is_kept]
    weight_access.check_writable(model, bases, exactly=True)
    for _, base in bases:
        BaseWeight(base).check_offloaded()


def atom_tensors(model: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """Module path -> deltas and fitted atoms of an atom adapter, by kind."""
    found: dict[str, dict[str, Tensor]] = {}
    persistent = model.state_dict()
    for path, layer in weight_access.walk(model):
        if isinstance(layer, AtomLayer) and name in layer.scaling:
            module = path.replace(".base_layer", "")
            for kind in TENSOR_NAMES:
                if (key := f"{path}.{attribute(kind)}.{name}") in persistent:
                    found.setdefault(module, {})[kind] = persistent[key]
    return found


def peft_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter of any PEFT method, under the keys that PEFT saves them with."""
    state = peft_state_dict(model, name)
    return {unwrapped_key(key): tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def unwrapped_key(key: str) -> str:
    """The key of a tensor as it is where its layer wraps no layers of other adapters, with PEFT's prefix."""
    return PEFT_PREFIX + key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def compute_coefficients(model: nn.Module, name: str) -> None:
    """Work out the sparse coefficients of an adapter now, which takes a while, and not in its first forward pass."""
    for layer in adapter_layers(model, name):
        for atoms in layer.atom_sets[name] if isinstance(layer, AtomLayer) else ():
            layer.coefficients(name, atoms)


def activate(model: nn.Module, names: list[str]) -> None:
    """Make exactly these adapters the active ones in every layer, and enable adapters."""
    with keep_requires_grad(model):
        for layer in adapter_layers(model):
            layer.set_adapter(names)
            layer.enable_adapters(True)


def set_weights_of_others(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Give adapters of other methods weights, such as `can_be_weighted` allows; they are not merged."""
    for layer in other_layers(model):
        for name in weights.keys() & set(layer._all_available_adapter_names()):
            set_scale_of(layer, name, weights[name])


def can_be_weighted(model: nn.Module, name: str, weight: float) -> bool:
    """Whether an adapter of another method can have a weight; all can have 1."""
    for layer in adapter_layers(model, name) if weight != 1 else ():
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


def peft_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter in a model, under the keys that PEFT saves them with."""
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}


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
