"""Add adapters of any PEFT method to a model, and take them out again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_state import (
    PEFT_PREFIX,
    adapter_configs,
    adapter_layers,
    is_atoms,
    keep_requires_grad,
    peft_state_dict,
    unwrapped_key,
)
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.dry_run import DryRun, copy_structure
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.model import find_atom_layer, refuse_fused


@contextmanager
def rollback_on_error(models: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Take an adapter out of the models again if adding it fails, so that they are as they were before.

    What is trainable stays so in any case.
    """
    models = list(models)
    active = [(layer, list(layer.active_adapters)) for model in models for layer in adapter_layers(model)]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(keep_requires_grad(model))
        try:
            yield
        except BaseException:
            for model in models:
                delete_adapter(model, name)
            for layer, names in active:
                layer.set_adapter(names)
            raise


def attach_atoms(model: Any, config: AtomConfig, layers: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Add an atom adapter with given deltas and atoms to exactly these layers.

    Args:
        model: the model.
        config: settings of the adapter.
        layers: module path -> tensors by kind, that fit the model.
        name: the adapter's name.
    """
    exactly = f"(?:{'|'.join(re.escape(module) for module in layers)})"  # no preset is written so
    chosen = {"target_modules": exactly, "exclude_modules": None, "layers_to_transform": None}
    inject(model, _copy_config(config, **chosen, filled_by_loader=True), name)
    for module, tensors in layers.items():
        layer = cast(AtomLayer, find_atom_layer(model.get_submodule(module)))
        with torch.no_grad():
            for kind, tensor in tensors.items():
                layer.tensors(kind)[name].copy_(tensor)
    model.peft_config[name] = _copy_config(config)


def attach_peft(
    model: Any,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    may_leave_out: Callable[[str], bool] = lambda module: False,
) -> list[str]:
    """Add an adapter of any PEFT method with given tensors.

    It is tried out first with tensors that take no memory: settings may ask for any amount of it.

    Args:
        model: the model.
        config: settings of the adapter.
        tensors: as `peft_tensors` gives them.
        name: the adapter's name.
        may_leave_out: tells of a module's path whether the rest is added where its tensors do not fit.

    Returns:
        Paths of the modules that were left out.

    Raises:
        ValueError: the tensors are not those of this method on this model.
    """
    atoms = is_atoms(config)
    updates: dict[str, Any] = {"filled_by_loader": True} if atoms else {}
    found = {unwrapped_key(key): tensor for key, tensor in tensors.items()}
    if atoms:  # as they were named at first
        found = {re.sub(r"\.channel_(delta|basis)$", r".atom_channel_\1", key): found[key] for key in found}
    expected = _expected_tensors(model, _copy_config(config, **updates), name)
    wrong = _differing(found, expected)
    left_out = sorted({_module_of(key, config) for key in wrong})
    rest = {_module_of(key, config) for key in found} - set(left_out)
    if left_out and rest and all(map(may_leave_out, left_out)):
        found = {key: tensor for key, tensor in found.items() if _module_of(key, config) in rest}
        there = {_module_of(key, config) for key in expected}
        if unfit := sorted(there.intersection(left_out)):
            updates |= _excluding(config, unfit, sorted(there.difference(left_out)))
        expected = _expected_tensors(model, _copy_config(config, **updates), name)
        wrong = _differing(found, expected)
    if wrong:
        of_file = tuple(found[wrong[0]].shape) if wrong[0] in found else "none"
        of_model = tuple(expected[wrong[0]][1]) if wrong[0] in expected else "none"
        way_out = f", or allow_base_mismatch=True for the {len(rest)} layers that fit" if rest else ""
        raise ValueError(
            f"its tensors do not fit this model: {wrong[0]!r:.200}: found {of_file}, by its settings expected "
            f"{of_model} ({len(wrong)} in all); load it into the base that it was made for, download it again{way_out}"
        )
    inject(model, _copy_config(config, **updates), name)
    set_peft_model_state_dict(model, {expected[key][0]: found[key] for key in found}, adapter_name=name)
    model.peft_config[name] = _copy_config(config)
    return left_out


def _expected_tensors(model: Any, config: PeftConfig, name: str) -> dict[str, tuple[str, torch.Size]]:
    """Key of each tensor that an adapter has, as files have it -> its key in this model, and its shape."""
    try:
        state = _dry_run(model, config, name, DryRun())
    except (RuntimeError, TypeError):  # a method that looks at the values of its first tensors
        state = _dry_run(model, config, name, DryRun(values=True))
    return {unwrapped_key(key): (key, tensor.shape) for key, tensor in state.items()}


def _dry_run(model: nn.Module, config: PeftConfig, name: str, mode: DryRun) -> dict[str, Tensor]:
    tried = copy_structure(model)
    with mode:
        inject(tried, config, name)
        return peft_state_dict(tried, name)


def _differing(found: Mapping[str, Tensor], expected: Mapping[str, tuple[str, torch.Size]]) -> list[str]:
    """Keys that only one of the two has, or with another shape."""
    shapes = {key: tensor.shape for key, tensor in found.items()}
    wanted = {key: shape for key, (_, shape) in expected.items()}
    return sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))


def _module_of(key: str, config: PeftConfig) -> str:
    """Path of the module that the tensor of a key belongs to."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[cast(Any, config).peft_type]
    return key.removeprefix(PEFT_PREFIX).partition(f".{prefix}")[0]


def _excluding(config: Any, modules: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """The change of settings by which an adapter leaves out some of its modules and keeps the others."""
    if not hasattr(config, "exclude_modules"):  # as in some of PEFT's methods
        return {"target_modules": "|".join(map(re.escape, others))}
    if isinstance(config.exclude_modules, str):
        names = (config.exclude_modules, *map(re.escape, modules))
        return {"exclude_modules": "|".join(f"(?:{each})" for each in names)}
    return {"exclude_modules": [*(config.exclude_modules or ()), *modules]}


def delete_adapter(model: Any, name: str) -> None:
    """Take an adapter out; a layer that is left without adapters becomes the bare base layer again."""
    with keep_requires_grad(model):
        paths = {layer: path for path, layer in weight_access.walk(model)}
        for layer in adapter_layers(model, name):
            layer.set_adapter([active for active in layer.active_adapters if active != name])
            layer.delete_adapter(name)
            if not layer._all_available_adapter_names():
                unwrap(model, paths[layer], layer)
    set_adapter_configs(model, {other: config for other, config in adapter_configs(model).items() if other != name})


def remove_leftovers(model: Any) -> None:
    """Take away what others leave of adapters that they delete: layers without any, and names without layers."""
    names: set[str] = set()
    for path, layer in reversed(weight_access.walk(model)):
        if isinstance(layer, AuxiliaryTrainingWrapper):
            names.update(layer._adapters)
        if isinstance(layer, BaseTunerLayer):
            found = layer._all_available_adapter_names()
            names.update(found)
            if not found:
                unwrap(model, path, layer)
    configs = adapter_configs(model)
    if not configs or not names.issuperset(configs):
        set_adapter_configs(model, {name: config for name, config in configs.items() if name in names})


def unwrap(model: nn.Module, path: str, layer: Any) -> None:
    """Put the base layer of an adapter layer back in its place."""
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, child, layer.base_layer)
    if not any(isinstance(other, AtomLayer) for other in parent.children()):
        for key in [key for key, hook in parent._forward_pre_hooks.items() if hook is refuse_fused]:
            del parent._forward_pre_hooks[key]


def set_adapter_configs(model: Any, configs: dict[str, Any]) -> None:
    """Set the record of adapters that PEFT, diffusers and transformers read; without any, there is no record."""
    if configs:
        model.peft_config = configs
        return
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


def inject(model: Any, config: PeftConfig, name: str) -> None:
    """As PEFT's `inject_adapter_in_model`, without its warning that a model gets several adapters."""
    merged = [(layer, layer.merged_adapters) for layer in adapter_layers(model) if layer.merged]
    for layer, _ in merged:
        layer.merged_adapters = []  # PEFT would unmerge these layers, others than atoms in their own inexact way
    try:
        _quiet_tuner(config)(model, {**adapter_configs(model), name: config}, adapter_name=name)
    finally:
        for layer, names in merged:
            layer.merged_adapters = names
    model._hf_peft_config_loaded = True  # what diffusers and transformers look at


def _quiet_tuner(config: Any) -> Any:
    """The PEFT tuner of a method; it takes the settings of all adapters from its caller, not from the model."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or tuner.uses_shared_state or config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{config.peft_type} adapters are more than layers: use peft.get_peft_model")

    class Quiet(tuner):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            if name == "peft_config":  # where the model has one, PEFT warns of several adapters
                raise AttributeError(name)
            return super().__getattr__(name)

    return Quiet


def _copy_config(config: Any, **updates: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in {"inference_mode": True, **updates}.items():
        setattr(changed, key, value)
    return changed
