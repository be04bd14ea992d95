"""Put adapters of any PEFT method into a model, merge them, and take them out with every bit of the base as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from atomdiff.tuner import kept_weights, weight_storage
from atomdiff.tuner.allocation import Trial, structure_of
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import TENSOR_KINDS, AtomLayer, attribute
from atomdiff.tuner.model import base_modules, find_atom_layer, refuse_fused, supported_modules
from atomdiff.utils.errors import UserError

_PEFT_PREFIX = "base_model.model."


def adapter_layers(model: nn.Module, name: str | None = None) -> list[Any]:
    """The adapter layers of a model, or those with one adapter, outer ones before those that they wrap."""
    layers: list[Any] = [module for _, module in weight_storage.walk(model) if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if name is None or name in layer._all_available_adapter_names()]


def atom_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> atom layer, for all of a model."""
    found = {path: module for path, module in weight_storage.walk(model) if isinstance(module, AtomLayer)}
    return {path.replace(".base_layer", ""): layer for path, layer in found.items()}


def layers_by_path(model: nn.Module) -> dict[str, Any]:
    """Path -> adapter layer of any method; of several on one module, each with its own path below the outer one's."""
    return {path: module for path, module in weight_storage.walk(model) if isinstance(module, BaseTunerLayer)}


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
    return {path: kept_weights.unmerged(module).detach() for path, module in supported_modules(model).items()}


def check_readable(model: nn.Module, modules: Iterable[str]) -> None:
    """Check that the weights of modules can be read where they are, and that calls use them.

    Raises:
        UserError: one cannot.
    """
    there = dict(base_modules(model))
    weight_storage.check_read(model, [(path, there[path]) for path in modules if path in there])


def check_at_hand(model: nn.Module) -> None:
    """Check that the tensors of atom adapters can be read outside of calls.

    Raises:
        UserError: they cannot.
    """
    layers = atom_layers(model).values()
    weight_storage.check_at_hand(model, [layer.tensors(kind) for layer in layers for kind in TENSOR_KINDS])


def check_writable(model: nn.Module) -> None:
    """Check that the weights of all adapted layers can be changed in place.

    Raises:
        UserError: one cannot.
    """
    layers = {
        path.replace(".base_layer", ""): m for path, m in weight_storage.walk(model) if isinstance(m, BaseTunerLayer)
    }
    bases = {path: cast(Any, layer).get_base_layer() for path, layer in layers.items()}
    weight_storage.check_written(model, bases.items())
    for base in bases.values():
        kept_weights.check_stored(base)


def check_restorable(model: nn.Module) -> None:
    """Check that all weights that are merged can be given back.

    Raises:
        UserError: one cannot.
    """
    bases = [(path.replace(".base_layer", ""), m) for path, m in weight_storage.walk(model) if kept_weights.is_kept(m)]
    weight_storage.check_written(model, bases, exactly=True)
    for _, base in bases:
        kept_weights.check_stored(base)


def atom_tensors(model: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """Module path -> deltas and fitted atoms of an atom adapter, by kind."""
    found: dict[str, dict[str, Tensor]] = {}
    persistent = model.state_dict()
    for path, layer in weight_storage.walk(model):
        if isinstance(layer, AtomLayer) and name in layer.scaling:
            module = path.replace(".base_layer", "")
            for kind in TENSOR_KINDS:
                if (key := f"{path}.{attribute(kind)}.{name}") in persistent:
                    found.setdefault(module, {})[kind] = persistent[key]
    return found


def peft_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter of any PEFT method, under the keys that PEFT saves them with."""
    state = _peft_state(model, name)
    return {_without_wrapping(key): tensor.detach().cpu().contiguous() for key, tensor in state.items()}


@contextmanager
def undone_on_error(models: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Take an adapter out of the models again if adding it fails, so that they are as they were before.

    What is trainable stays so in any case.
    """
    models = list(models)
    active = [(layer, list(layer.active_adapters)) for model in models for layer in adapter_layers(model)]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_kept_requires_grad(model))
        try:
            yield
        except BaseException:
            for model in models:
                detach(model, name)
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
    _inject(model, _changed(config, **chosen, filled_by_loader=True), name)
    for module, tensors in layers.items():
        layer = cast(AtomLayer, find_atom_layer(model.get_submodule(module)))
        with torch.no_grad():
            for kind, tensor in tensors.items():
                layer.tensors(kind)[name].copy_(tensor)
    model.peft_config[name] = _changed(config)


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
    changes: dict[str, Any] = {"filled_by_loader": True} if atoms else {}
    found = {_without_wrapping(key): tensor for key, tensor in tensors.items()}
    if atoms:  # as they were named at first
        found = {re.sub(r"\.channel_(delta|basis)$", r".atom_channel_\1", key): found[key] for key in found}
    expected = _try_out(model, _changed(config, **changes), name)
    wrong = _differing(found, expected)
    left_out = sorted({_module_of(key, config) for key in wrong})
    rest = {_module_of(key, config) for key in found} - set(left_out)
    if left_out and rest and all(map(may_leave_out, left_out)):
        found = {key: tensor for key, tensor in found.items() if _module_of(key, config) in rest}
        there = {_module_of(key, config) for key in expected}
        if unfit := sorted(there.intersection(left_out)):
            changes |= _excluding(config, unfit, sorted(there.difference(left_out)))
        expected = _try_out(model, _changed(config, **changes), name)
        wrong = _differing(found, expected)
    if wrong:
        of_file = tuple(found[wrong[0]].shape) if wrong[0] in found else "none"
        of_model = tuple(expected[wrong[0]][1]) if wrong[0] in expected else "none"
        way_out = f", or allow_base_mismatch=True for the {len(rest)} layers that fit" if rest else ""
        raise ValueError(
            f"its tensors do not fit this model: {wrong[0]!r:.200}: found {of_file}, by its settings expected "
            f"{of_model} ({len(wrong)} in all); load it into the base that it was made for, download it again{way_out}"
        )
    _inject(model, _changed(config, **changes), name)
    set_peft_model_state_dict(model, {expected[key][0]: found[key] for key in found}, adapter_name=name)
    model.peft_config[name] = _changed(config)
    return left_out


def _try_out(model: Any, config: PeftConfig, name: str) -> dict[str, tuple[str, torch.Size]]:
    """Key of each tensor that an adapter has, as files have it -> its key in this model, and its shape."""
    try:
        state = _state_in_trial(model, config, name, Trial())
    except (RuntimeError, TypeError):  # a method that looks at the values of its first tensors
        state = _state_in_trial(model, config, name, Trial(values=True))
    return {_without_wrapping(key): (key, tensor.shape) for key, tensor in state.items()}


def _state_in_trial(model: nn.Module, config: PeftConfig, name: str, trial: Trial) -> dict[str, Tensor]:
    tried = structure_of(model)
    with trial:
        _inject(tried, config, name)
        return _peft_state(tried, name)


def _differing(found: Mapping[str, Tensor], expected: Mapping[str, tuple[str, torch.Size]]) -> list[str]:
    """Keys that only one of the two has, or with another shape."""
    shapes = {key: tensor.shape for key, tensor in found.items()}
    wanted = {key: shape for key, (_, shape) in expected.items()}
    return sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key))


def _without_wrapping(key: str) -> str:
    """The key of a tensor as it is where its layer wraps no layers of other adapters, with PEFT's prefix."""
    return _PEFT_PREFIX + key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def _module_of(key: str, config: PeftConfig) -> str:
    """Path of the module that the tensor of a key belongs to."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[cast(Any, config).peft_type]
    return key.removeprefix(_PEFT_PREFIX).partition(f".{prefix}")[0]


def _excluding(config: Any, modules: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """The change of settings by which an adapter leaves out some of its modules and keeps the others."""
    if not hasattr(config, "exclude_modules"):  # as in some of PEFT's methods
        return {"target_modules": "|".join(map(re.escape, others))}
    if isinstance(config.exclude_modules, str):
        names = (config.exclude_modules, *map(re.escape, modules))
        return {"exclude_modules": "|".join(f"(?:{each})" for each in names)}
    return {"exclude_modules": [*(config.exclude_modules or ()), *modules]}


def encode(model: nn.Module, name: str) -> None:
    """Work out the sparse codes of an adapter now, which takes a while, and not in its first forward pass."""
    for layer in adapter_layers(model, name):
        for factor in layer.factors[name] if isinstance(layer, AtomLayer) else ():
            layer.codes(name, factor)


def detach(model: Any, name: str) -> None:
    """Take an adapter out; a layer that is left without adapters becomes the bare base layer again."""
    with _kept_requires_grad(model):
        paths = {layer: path for path, layer in weight_storage.walk(model)}
        for layer in adapter_layers(model, name):
            layer.set_adapter([active for active in layer.active_adapters if active != name])
            layer.delete_adapter(name)
            if not layer._all_available_adapter_names():
                _take_away(model, paths[layer], layer)
    _set_configs(model, {other: config for other, config in adapter_configs(model).items() if other != name})


def tidy(model: Any) -> None:
    """Take away what others leave of adapters that they delete: layers without any, and names without layers."""
    names: set[str] = set()
    for path, layer in reversed(weight_storage.walk(model)):
        if isinstance(layer, AuxiliaryTrainingWrapper):
            names.update(layer._adapters)
        if isinstance(layer, BaseTunerLayer):
            found = layer._all_available_adapter_names()
            names.update(found)
            if not found:
                _take_away(model, path, layer)
    configs = adapter_configs(model)
    if not configs or not names.issuperset(configs):
        _set_configs(model, {name: config for name, config in configs.items() if name in names})


def _take_away(model: nn.Module, path: str, layer: Any) -> None:
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, child, layer.base_layer)
    if not any(isinstance(other, AtomLayer) for other in parent.children()):
        for key in [key for key, hook in parent._forward_pre_hooks.items() if hook is refuse_fused]:
            del parent._forward_pre_hooks[key]


def _set_configs(model: Any, configs: dict[str, Any]) -> None:
    if configs:
        model.peft_config = configs
        return
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


def activate(model: nn.Module, names: list[str]) -> None:
    """Make exactly these adapters the active ones in every layer, and enable adapters."""
    with _kept_requires_grad(model):
        for layer in adapter_layers(model):
            layer.set_adapter(names)
            layer.enable_adapters(True)


def merge(model: nn.Module) -> None:
    """Write the active adapters of enabled layers into the weights; what was merged before is restored first.

    The untouched tensors are kept: while merged, the adapted layers take twice their memory.
    """
    restore(model)
    layers = [
        layer
        for layer in _merge_order(model)
        if not layer.disable_adapters and set(layer.active_adapters) & set(layer._all_available_adapter_names())
    ]
    for layer in layers:
        _check_in_place(layer)
    for layer in layers:
        _merge(layer)


def write(
    layers: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, float]],
    stored: Mapping[str, Callable[[], Tensor] | None],
    changed_only: bool = False,
) -> None:
    """Make exactly these adapters active in atom layers and write them into the weights, from the base.

    It takes no longer with many other adapters loaded.

    Args:
        layers: module path -> atom layer.
        weights: module path -> adapter -> weight; those that a layer lacks are passed over.
        stored: module path -> what reads the base weight, or None: it is kept on its device.
        changed_only: leave layers alone that have the same adapters with the same weights by now, or are disabled.
    """
    for path, layer in layers.items():
        mine = {name: weight for name, weight in weights[path].items() if name in layer.scaling}
        if changed_only and (layer.disable_adapters or layer.written == mine):
            continue
        # PEFT's own calls go through all adapters that are loaded.
        layer._active_adapter, layer._disable_adapters = list(weights[path]), False
        layer.scaling.update(mine)
        layer.write(list(mine), stored[path])


def merge_others(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters of other methods active, and merge them; `restore_others` comes before.

    Args:
        model: the model.
        weights: adapter -> weight, such as `can_be_weighted` allows.
    """
    for layer in _merge_order(model):
        if not isinstance(layer, AtomLayer):
            names = [name for name in weights if name in layer._all_available_adapter_names()]
            layer._active_adapter, layer._disable_adapters = names, False
            for name in names:
                _set_scale(layer, name, weights[name])
            if names:
                _merge(layer)


def set_weights_of_others(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Give adapters of other methods weights, such as `can_be_weighted` allows; they are not merged."""
    for layer in other_layers(model):
        for name in weights.keys() & set(layer._all_available_adapter_names()):
            _set_scale(layer, name, weights[name])


def can_be_weighted(model: nn.Module, name: str, weight: float) -> bool:
    """Whether an adapter of another method can have a weight; all can have 1."""
    for layer in adapter_layers(model, name) if weight != 1 else ():
        trial = copy.copy(layer)
        if hasattr(layer, "scaling"):
            trial.scaling = dict(layer.scaling)
        if not _set_scale(trial, name, weight):
            return False
    return True


def _set_scale(layer: Any, name: str, weight: float) -> bool:
    """Set an adapter's weight; False: its method has none."""
    set_scale: Any = getattr(type(layer), "set_scale", None)
    if set_scale is None or "warn" in set_scale.__code__.co_names:  # such a one does nothing else than to say so
        return False
    try:
        set_scale(layer, name, weight)
    except AttributeError:
        return False
    return True


def restore(model: nn.Module) -> None:
    """Undo `merge`: every weight has the bits it had, and the adapters act unmerged again.

    That includes weights whose adapter layers others have taken away meanwhile.
    """
    for layer in other_layers(model):
        if layer.merged and kept_weights.is_kept(layer.get_base_layer()):
            layer.merged_adapters.clear()  # the weight is given back below
        elif layer.merged:
            layer.unmerge()  # merged by others, without a copy: as exact as its method can
    for layer in atom_layers(model).values():
        layer.unmerge()
    _give_back(module for _, module in weight_storage.walk(model))


def strip(model: Any) -> None:
    """Take all adapters out of a copy of a model that shares its tensors with the model, which is left alone."""
    for path, module in reversed(weight_storage.walk(model)):
        if (stored := kept_weights.get_stored(module)) is not None:
            module._parameters["weight"] = nn.Parameter(
                stored().clone(), requires_grad=False
            )  # no window onto the file
        for name in list(module._parameters):
            value = kept_weights.get(module, name)
            if value is not None:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
                kept_weights.put(module, None, name)
        if isinstance(module, BaseTunerLayer):
            _take_away(model, path, module)
    _set_configs(model, {})


def restore_others(model: nn.Module) -> None:
    """Undo `merge` of other methods than atoms, which lie on top of atoms, and of layers that are gone."""
    atoms = {layer.get_base_layer(): layer for layer in atom_layers(model).values() if layer.holds_merged}
    for layer in other_layers(model):
        base = layer.get_base_layer()
        if base in atoms and (layer.merged or layer in kept_weights.merged_layers(base)):
            atoms[base].write(list(atoms[base].merged_adapters), atoms[base].stored_base_weight)
        elif layer.merged and not kept_weights.is_kept(base):
            layer.unmerge()  # merged by others, without a copy: as exact as its method can
        layer.merged_adapters.clear()
    _give_back([module for _, module in weight_storage.walk(model) if module not in atoms])


def _give_back(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if kept_weights.is_kept(module):
            kept_weights.release(module)
            kept_weights.give_back(module)


def keep_when_merged(model: nn.Module) -> None:
    """Let the layers of other methods than atoms keep the base whoever merges them: `fuse_lora` does not."""
    for layer in other_layers(model):
        vars(layer).setdefault("merge", partial(_merge_kept, layer))


def _check_in_place(layer: Any) -> None:
    """Check that a layer of another method than atoms would merge into the weight that calls compute with.

    Raises:
        UserError: that is offloaded, and the layer would merge into a tensor without values.
    """
    base = layer.get_base_layer()
    if not isinstance(layer, AtomLayer) and any(parameter.is_meta for parameter in base.parameters(recurse=False)):
        raise UserError(
            f"the weights of a layer are offloaded, where PEFT cannot merge a {type(layer).__name__}: use such "
            "adapters unmerged (pipe.set_adapters), or load the pipeline anew, in memory and in full"
        )


def _merge_kept(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """As the layer's own `merge`; the base is kept, and its memory stays where it is."""
    if not check_adapters_to_merge(layer, adapter_names):
        return
    _check_in_place(layer)
    base = layer.get_base_layer()
    kept_weights.keep_for(base, layer)
    in_place = {parameter: parameter.data for _, parameter in base.named_parameters(recurse=False)}
    type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    for parameter, data in in_place.items():
        if parameter.data_ptr() != data.data_ptr():  # some put a new tensor there
            parameter.data = data.copy_(parameter.data)


def _merge(layer: Any) -> None:
    if isinstance(layer, AtomLayer):
        layer.merge()
    else:
        _merge_kept(layer)


def _merge_order(model: nn.Module) -> list[Any]:
    """Atoms change the base weight and come first; of other layers on one module, inner ones before outer ones."""
    return sorted(reversed(adapter_layers(model)), key=lambda layer: not isinstance(layer, AtomLayer))


def _peft_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {_PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}


def _inject(model: Any, config: PeftConfig, name: str) -> None:
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


def _changed(config: Any, **changes: Any) -> Any:
    changed = copy.deepcopy(config)
    for key, value in {"inference_mode": True, **changes}.items():
        setattr(changed, key, value)
    return changed


@contextmanager
def _kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """PEFT freezes and unfreezes parameters as it switches adapters; those there now stay as they are."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(flag)
