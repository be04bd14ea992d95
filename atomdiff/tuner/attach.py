"""Add adapters of any PEFT method to a model, and take them out again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from atomdiff.atoms.variants import kept_atoms
from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_state import (
    PEFT_PREFIX,
    adapter_configs,
    adapter_layers,
    can_mix,
    is_atoms,
    keep_requires_grad,
    module_path,
    peft_state_dict,
    unwrapped_key,
)
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.dry_run import DryRun, copy_structure
from atomdiff.tuner.inject import inject, set_adapter_configs, unwrap
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.model import find_atom_layer
from atomdiff.tuner.shared_state import as_peft_model, shared_state
from atomdiff.tuner.slots import remove_empty_slots


@contextmanager
def rollback_on_error(models: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Take an adapter out of the models again if adding it fails, so that they are as they were before.

    What is trainable stays so in any case.
    """
    models = list(models)
    active = [(layer, list(layer.active_adapters)) for model in models for layer in adapter_layers(model).values()]
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
    """Add an atom adapter to exactly these layers: module path -> its deltas and atoms by kind, which fit the model."""
    exactly = f"(?:{'|'.join(re.escape(module) for module in layers)})"  # no preset is written so
    chosen = {"target_modules": exactly, "exclude_modules": None, "layers_to_transform": None}
    kept = {module: kept_atoms(tensors) for module, tensors in layers.items()} if config.pruned else None
    inject(model, _copy_config(config, **chosen, filled_by_loader=True, kept_atoms=kept), name)
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

    It is tried out first with tensors that take no memory: settings may ask for any amount of it. Where tensors do not
    fit, `may_leave_out` tells of the path of their module whether the rest is added.

    Returns:
        Paths of the modules that were left out.

    Raises:
        ValueError: the tensors are not those of this method on this model.
    """
    tensors = {unwrapped_key(key): tensor for key, tensor in tensors.items()}
    updates: dict[str, Any] = {}
    if is_atoms(config):
        tensors = {re.sub(r"\.channel_(delta|basis)$", r".atom_channel_\1", key): tensors[key] for key in tensors}
    if hasattr(config, "filled_by_loader"):
        updates["filled_by_loader"] = True
    expected = _expected_tensors(model, _copy_config(config, **updates), name)
    misfits = _differing(tensors, expected)
    left_out = sorted({_module_of(key, config) for key in misfits})
    fitting = {_module_of(key, config) for key in tensors}.difference(left_out)
    if left_out and fitting and all(map(may_leave_out, left_out)):
        tensors = {key: tensor for key, tensor in tensors.items() if _module_of(key, config) in fitting}
        updates |= _excluding(config, left_out, {_module_of(key, config) for key in expected})
        expected = _expected_tensors(model, _copy_config(config, **updates), name)
        misfits = _differing(tensors, expected)
    if misfits:
        raise _describe_misfits(misfits, tensors, expected, len(fitting))
    inject(model, _copy_config(config, **updates), name)
    _check_in_place(model, name)
    own = {expected[key][0]: tensors[key] for key in tensors}
    set_peft_model_state_dict(as_peft_model(model), own, adapter_name=name)
    model.peft_config[name] = _copy_config(config)
    return left_out


def _check_in_place(model: nn.Module, name: str) -> None:
    """Check that PEFT did not put new tensors of an adapter where offloading has those of the base, for it to lose.

    Raises:
        ValueError: it did.
    """
    for path, layer in adapter_layers(model, name).items():
        if not can_mix(layer) and weight_access.is_offloaded(layer.get_base_layer()):
            raise ValueError(
                f"{module_path(path)} is offloaded, which only concepts of atoms and adapters of activations can be "
                "added to: load others before the pipeline is offloaded"
            )


_Expected = Mapping[str, tuple[str, torch.Size]]
"""Key of each tensor that an adapter has, as files have it -> its key in this model, and its shape."""


def _expected_tensors(model: nn.Module, config: PeftConfig, name: str, values: bool = False) -> _Expected:
    copied = copy_structure(model)
    try:
        with DryRun(values):
            inject(copied, config, name)
            state = peft_state_dict(copied, name)
    except (RuntimeError, TypeError):  # a method that looks at the values of its first tensors
        if values:
            raise
        return _expected_tensors(model, config, name, values=True)
    return {unwrapped_key(key): (key, tensor.shape) for key, tensor in state.items()}


def _differing(tensors: Mapping[str, Tensor], expected: _Expected) -> list[str]:
    """Keys that only one of the two has, or with another shape."""
    of_file = {key: tensor.shape for key, tensor in tensors.items()}
    of_model = {key: shape for key, (_, shape) in expected.items()}
    return sorted(key for key in of_file.keys() | of_model.keys() if of_file.get(key) != of_model.get(key))


def _describe_misfits(
    misfits: Sequence[str], tensors: Mapping[str, Tensor], expected: _Expected, num_fitting: int
) -> ValueError:
    key = misfits[0]
    of_file = tuple(tensors[key].shape) if key in tensors else "none"
    of_model = tuple(expected[key][1]) if key in expected else "none"
    way_out = f", or allow_base_mismatch=True for the {num_fitting} layers that fit" if num_fitting else ""
    return ValueError(
        f"its tensors do not fit this model: {key!r:.200}: found {of_file}, by its settings expected {of_model} "
        f"({len(misfits)} in all); load it into the base that it was made for, download it again{way_out}"
    )


def _module_of(key: str, config: PeftConfig) -> str:
    """Path of the module that the tensor of a key belongs to."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[cast(Any, config).peft_type]
    return key.removeprefix(PEFT_PREFIX).partition(f".{prefix}")[0]


def _excluding(config: Any, left_out: Sequence[str], modules: set[str]) -> dict[str, Any]:
    """The change of settings by which an adapter leaves out some of the modules that it would have."""
    unfit = sorted(modules.intersection(left_out))
    if not unfit:
        return {}
    if not hasattr(config, "exclude_modules"):  # as in some of PEFT's methods
        return {"target_modules": "|".join(map(re.escape, sorted(modules.difference(unfit))))}
    if isinstance(config.exclude_modules, str):
        patterns = (config.exclude_modules, *map(re.escape, unfit))
        return {"exclude_modules": "|".join(f"(?:{pattern})" for pattern in patterns)}
    return {"exclude_modules": [*(config.exclude_modules or ()), *unfit]}


def delete_adapter(model: Any, name: str) -> None:
    """Take an adapter out; a layer that is left without adapters becomes the bare base layer again."""
    with keep_requires_grad(model):
        for path, layer in adapter_layers(model, name).items():
            layer.set_adapter([active for active in layer.active_adapters if active != name])
            layer.delete_adapter(name)
            if not layer._all_available_adapter_names():
                unwrap(model, path, layer)
        for shared in shared_state(model).values():
            if name in shared:  # some methods leave it there
                del shared[name]
    set_adapter_configs(model, {each: config for each, config in adapter_configs(model).items() if each != name})


def remove_leftovers(model: Any) -> None:
    """Take away what others leave of adapters that they delete: layers without any, and names without layers."""
    names: set[str] = set()
    for path, layer in reversed(weight_access.walk(model)):
        if isinstance(layer, AuxiliaryTrainingWrapper):
            names.update(layer._adapters)
        if isinstance(layer, BaseTunerLayer):
            of_layer = layer._all_available_adapter_names()
            names.update(of_layer)
            if not of_layer:
                unwrap(model, path, layer)
        remove_empty_slots(layer)
    configs = adapter_configs(model)
    if not configs or not names.issuperset(configs):
        set_adapter_configs(model, {name: config for name, config in configs.items() if name in names})


def _copy_config(config: Any, **updates: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in {"inference_mode": True, **updates}.items():
        setattr(changed, key, value)
    return changed
