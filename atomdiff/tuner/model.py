"""Put atom layers into a model."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, NoMatchingPeftModuleError
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from atomdiff.atoms.variants import atoms_of, variant_of
from atomdiff.tuner import weight_access
from atomdiff.tuner.config import PRESETS, AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.peft_type import PREFIX
from atomdiff.tuner.shared_directions import in_each_layer, is_shared
from atomdiff.utils.functional_call import PLAIN_LAYERS

ATTENTION_PROJECTIONS = re.compile(
    r"(.*\.)?(to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|[qkvo]_proj|out_proj|query|key|value"
    r"|attention\.output\.dense|(Self|EncDec)Attention\.[qkvo])"
)
CROSS_ATTENTION = re.compile(
    r"(.*\.)?(attn2|cross_?attn|cross_?attention|encoder_attn|multihead_attn|EncDecAttention)\..*", re.IGNORECASE
)
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # read the weights of layers inside, past their forward
_NAMED_SHOWN = 8


class AtomModel(BaseTuner):
    """The PEFT tuner; use it by `get_peft_model(model, AtomConfig(...))` or `model.add_adapter(AtomConfig(...))`."""

    prefix = PREFIX
    tuner_layer_cls = AtomLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse what cannot work before a layer updates, and leave no name of it behind."""
        self._shared: dict[tuple[Any, ...], nn.Parameter] = {}  # of the adapter that is being added
        try:
            self._targets = set(find_targets(model, peft_config))
        except (ValueError, TypeError):
            forget_config(model, peft_config)
            raise

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads; directions that layers share are one parameter, which may take the place of theirs."""
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = in_each_layer(state)
        parameters = {id(t): nn.Parameter(t, requires_grad=False) for key, t in state.items() if is_shared(key)}
        return {key: parameters.get(id(tensor), tensor) for key, tensor in state.items()}

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        match = _matches(peft_config, key)
        return match if isinstance(match, _ExcludedModule) else key in self._targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = find_atom_layer(target)
        if layer is not None:
            layer.update_layer(adapter_name, peft_config, current_key, self._shared)
            return
        layer = AtomLayer(target)
        layer.update_layer(adapter_name, peft_config, current_key, self._shared)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)  # on its device already: PEFT would follow weights to the meta device
        if hasattr(parent, "fused_projections") and refuse_fused not in parent._forward_pre_hooks.values():
            parent.register_forward_pre_hook(refuse_fused)


def forget_config(model: Any, config: Any) -> None:
    """Take the settings of an adapter that is refused out of a model's record, where diffusers has put them before."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    for name in [name for name, other in configs.items() if other is config]:
        del configs[name]
    if not configs and hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False


def refuse_fused(attention: nn.Module, _: Any) -> None:
    """Refuse, before a call, what `fuse_qkv_projections` leaves without effect.

    Raises:
        ValueError: adapters act on projections that were fused into a copy of their weights.
    """
    if not weight_access.is_fused(attention):
        return
    for name, child in attention.named_children():
        layer = find_atom_layer(child)
        if layer is None or (layer.mixed_batch is None and (layer.holds_merged or layer.disable_adapters)):
            continue
        if layer.mixed_batch is not None or any(map(layer.scaling.get, layer.active_adapters)):
            raise ValueError(
                f"{name} has an adapter, and fuse_qkv_projections() has put a copy of its weight in its place: "
                "call unfuse_qkv_projections(), or write the concept into the weights before (atomdiff.set_active)"
            )


def find_targets(model: nn.Module, config: AtomConfig) -> dict[str, nn.Module]:
    """The layers that an adapter of this config gets in a model, by module path.

    Raises:
        NoMatchingPeftModuleError: no layer matches.
        ValueError: a setting has nothing to act on, or `num_atoms` exceeds a row.
        TypeError: a module matches that atoms cannot adapt.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:
        return {}
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    modules = dict(base_modules(model))
    obstacles = _obstacles(model, modules)
    preset = preset_targets(model, config.target_modules) if config.target_modules in PRESETS else modules.keys()
    targets = {name: module for name, module in modules.items() if name in preset and _matches(config, name) is True}
    if wrong := [obstacles[name] for name in targets if name in obstacles]:
        raise TypeError(wrong[0])
    if not targets:
        raise NoMatchingPeftModuleError(_nothing_matches(model, config))
    if not config.filled_by_loader:  # which has checked the layers of a file one by one
        _check_settings(config, {name: tuple(cast(Any, module).weight.shape) for name, module in targets.items()})
    return targets


def supported_modules(model: nn.Module) -> dict[str, Any]:
    """All layers that atoms can adapt, by module path, as they are below adapters that are there already."""
    modules = dict(base_modules(model))
    obstacles = _obstacles(model, modules)
    return {name: module for name, module in modules.items() if name not in obstacles}


def preset_targets(model: nn.Module, preset: str) -> set[str]:
    """Names of the layers that a preset (one of `PRESETS`) means in this model."""
    return {name for name, module in supported_modules(model).items() if preset in _presets_of(name, module)}


def find_atom_layer(module: nn.Module) -> AtomLayer | None:
    """The atom layer among the adapter layers that wrap one another here."""
    inside = module.modules() if isinstance(module, BaseTunerLayer) else ()
    return next((layer for layer in inside if isinstance(layer, AtomLayer)), None)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by path; of adapted ones the base, and nothing inside."""
    inside: tuple[str, ...] = ()
    for name, module in weight_access.walk(model):
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        yield name, module


def _obstacles(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why atoms cannot adapt a module, by path, for all that they cannot."""
    fused = tuple(
        f"{name}." if name else "" for name, module in weight_access.walk(model) if isinstance(module, _FUSED)
    )
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}
    uses = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    obstacles = {}
    for name, module in modules.items():
        kind, weight = type(module).__name__, weights[name]
        if not isinstance(module, PLAIN_LAYERS):
            names = ", ".join(supported.__name__ for supported in PLAIN_LAYERS)
            obstacles[name] = f"{name} is a {kind}; atoms adapt {names}: leave it out of target_modules"
        elif weight is None:
            obstacles[name] = f"the weight of {name} ({kind}) comes from a parametrization, where atoms cannot act"
        elif fused and name.startswith(fused):
            obstacles[name] = (
                f"the weight of {name} ({kind}) is used by another module's forward, where atoms cannot act"
            )
        elif not weight.is_floating_point():
            obstacles[name] = f"the weight of {name} is {weight.dtype}; atoms adapt floating-point weights only"
        elif reason := weight_access.why_not_adapted(module):
            obstacles[name] = f"the weight of {name} cannot be adapted: {reason}"
        elif attention := weight_access.fused_parent(model, name):
            obstacles[name] = f"{name} is fused into a copy within {attention}: call unfuse_qkv_projections() first"
        elif uses[id(weight)] > 1:
            obstacles[name] = f"the weight of {name} is shared with another module, which adapting it would change too"
    return obstacles


def _presets_of(name: str, module: Any) -> set[str]:
    presets = {"all"}
    if isinstance(module, nn.Linear):
        if name.rpartition(".")[2] in ("proj_in", "proj_out"):
            presets.add("conv+proj")
        if ATTENTION_PROJECTIONS.fullmatch(name):
            presets.add("attention")
            if CROSS_ATTENTION.fullmatch(name):
                presets.add("cross_attention")
    else:
        presets.add("conv+proj")
        if math.prod(module.weight.shape[2:]) > 1:
            presets.add("conv")
    return presets


def _matches(config: AtomConfig, name: str) -> Any:
    """PEFT's own answer to lists, regular expressions, exclusions, indexes; a preset is a list of endings to it."""
    if config.target_modules in PRESETS:
        config = copy.copy(config)
        config.target_modules = [name.rpartition(".")[2]]
        if "." not in name and config.layers_to_transform is not None:
            return False
    match = check_target_module_exists(config, name)
    return match if isinstance(match, _ExcludedModule) else bool(match)


def _nothing_matches(model: nn.Module, config: AtomConfig) -> str:
    supported = supported_modules(model)
    counts = {preset: len(preset_targets(model, preset)) for preset in PRESETS}
    presets = ", ".join(f"{preset!r} ({count} layers)" for preset, count in counts.items() if count)
    names = ", ".join(list(supported)[:_NAMED_SHOWN]) + (", ..." if len(supported) > _NAMED_SHOWN else "")
    fields = {key: getattr(config, key) for key in ("target_modules", "exclude_modules", "layers_to_transform")}
    asked = ", ".join(f"{key}={value!r}" for key, value in fields.items() if value is not None)
    available = f"there are {presets}; layers by name: {names}" if supported else "it has no layer that atoms can adapt"
    return f"{asked} matches no layer of this {type(model).__name__}: {available}"


def _check_settings(config: AtomConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    layers = {name: atoms_of(config, name, shape) for name, shape in shapes.items()}
    variant_of(config).check_targets(config, layers)
    sides = {name: config.block_of(name) for name in shapes}
    blocks = {atoms.view.block for of_layer in layers.values() for atoms in of_layer}
    if max(sides.values()) > 1 and blocks == {(1, 1)}:
        name = max(sides, key=sides.__getitem__)
        raise ValueError(
            f"a channel block of {sides[name]} divides no channel count of the {len(shapes)} matching layers "
            f"({name} has {shapes[name][0]} and {shapes[name][1]}): use a divisor, or 1 for no blocks"
        )
