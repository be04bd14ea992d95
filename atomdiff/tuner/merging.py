"""Write adapters of any PEFT method into the weights, and give back every bit of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_state import (
    adapter_layers,
    atom_layers,
    changes_weights,
    other_layers,
    set_scale_of,
)
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.inject import set_adapter_configs, unwrap
from atomdiff.tuner.layer import AtomLayer
from atomdiff.utils.errors import UserError


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
        layer.merge() if isinstance(layer, AtomLayer) else _merge_kept(layer)


def write(
    layers: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, float]],
    base_readers: Mapping[str, Callable[[], Tensor] | None],
    changed_only: bool = False,
) -> None:
    """Make exactly these adapters active in atom layers and write them into the weights, from the base.

    It takes no longer with many other adapters loaded.

    Args:
        layers: module path -> atom layer.
        weights: module path -> adapter -> weight; those that a layer lacks are passed over.
        base_readers: module path -> what reads the base weight, or None: it is kept on its device.
        changed_only: leave layers alone that have the same adapters with the same weights by now, or are disabled.
    """
    for path, layer in layers.items():
        of_layer = {name: weight for name, weight in weights[path].items() if name in layer.scaling}
        if changed_only and (layer.disable_adapters or layer.written == of_layer):
            continue
        # PEFT's own calls go through all adapters that are loaded.
        layer._active_adapter, layer._disable_adapters = list(weights[path]), False
        layer.scaling.update(of_layer)
        layer.write(of_layer, base_readers[path])


def merge_others(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters of other methods active, and merge them; `restore_others` comes before.

    Those that act on activations stay unmerged. Their weights are such as `can_be_weighted` allows.
    """
    for layer in _merge_order(model):
        if not isinstance(layer, AtomLayer):
            names = [name for name in weights if name in layer._all_available_adapter_names()]
            layer._active_adapter, layer._disable_adapters = names, False
            for name in names:
                set_scale_of(layer, name, weights[name])
            if names and changes_weights(layer):
                _merge_kept(layer)


def restore(model: nn.Module) -> None:
    """Undo `merge`: every weight has the bits it had, and the adapters act unmerged again.

    That includes weights whose adapter layers others have taken away meanwhile.
    """
    for layer in other_layers(model):
        BaseWeight(layer.get_base_layer()).release(layer)
    for layer in atom_layers(model).values():
        layer.unmerge()
    _give_back(module for _, module in weight_access.walk(model))


def strip_adapters(model: Any) -> None:
    """Take all adapters out of a copy of a model that shares its tensors with the model, which is left alone."""
    for path, module in reversed(weight_access.walk(model)):
        base = BaseWeight(module)
        if (offloaded := base.offloaded) is not None:
            weight = offloaded().clone()  # no window onto the file
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        for name in list(module._parameters):
            if (value := base.copy_of(name)) is not None:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
                base.set_copy(None, name)
        if isinstance(module, BaseTunerLayer):
            unwrap(model, path, module)
    set_adapter_configs(model, {})


def restore_others(model: nn.Module) -> None:
    """Undo `merge` of other methods than atoms, which lie on top of atoms, and of layers that are gone."""
    atoms = {layer.get_base_layer(): layer for layer in atom_layers(model).values() if layer.holds_merged}
    for layer in other_layers(model):
        base = layer.get_base_layer()
        if base in atoms and (layer.merged or layer in BaseWeight(base).merged_layers):
            atoms[base].write(atoms[base].written, BaseWeight(base).offloaded)
        BaseWeight(base).release(layer)
    _give_back([module for _, module in weight_access.walk(model) if module not in atoms])


def _give_back(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if (base := BaseWeight(module)).is_kept:
            base.release_layers()
            base.restore()


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
            "adapters unmerged (pipe.set_adapters), or load the pipeline again, in memory and in full"
        )


def _merge_kept(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """As the layer's own `merge`; the base is kept, and its memory stays where it is."""
    if not check_adapters_to_merge(layer, adapter_names):
        return
    if not changes_weights(layer):
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)  # which says why not
        return
    _check_in_place(layer)
    base = layer.get_base_layer()
    BaseWeight(base).keep_for(layer)
    in_place = {parameter: parameter.data for _, parameter in base.named_parameters(recurse=False)}
    type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    if (tuned := layer.get_base_layer()) is not base:  # LN tuning puts a layer of its own there
        names = list(layer.merged_adapters)
        layer.unmerge()
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = tuned.get_parameter(name).data
        layer.merged_adapters = names
    for parameter, data in in_place.items():
        if parameter.data_ptr() != data.data_ptr():  # some put a new tensor there
            parameter.data = data.copy_(parameter.data)


def _merge_order(model: nn.Module) -> list[Any]:
    """Atoms change the base weight and come first; of other layers on one module, inner ones before outer ones."""
    return sorted(reversed(adapter_layers(model).values()), key=lambda layer: not isinstance(layer, AtomLayer))
