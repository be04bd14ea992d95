"""Put atom layers into a model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn

from atomdiff.tuner.config import PRESETS
from atomdiff.tuner.layer import SUPPORTED, AtomLayer
from atomdiff.tuner.register import PREFIX

ATTENTION_PROJECTIONS = re.compile(
    r"(.*\.)?(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|[qkvo]_proj|out_proj|query|key|value)"
)


class AtomModel(BaseTuner):
    """The PEFT tuner; use it by `get_peft_model(model, AtomConfig(...))` or `model.add_adapter(AtomConfig(...))`."""

    prefix = PREFIX
    tuner_layer_cls = AtomLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        preset = peft_config.target_modules
        self._preset_targets = preset_targets(model, preset) if preset in PRESETS else None

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = check_target_module_exists(peft_config, key)
        if self._preset_targets is None or isinstance(found, _ExcludedModule):
            return found
        return key in self._preset_targets

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
            layer.update_layer(adapter_name, peft_config, current_key)
            return
        layer = _new_layer(target, current_key)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def supported_modules(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """All layers that atoms can adapt, by module path, as they are below adapters that are there already."""
    modules: dict[str, nn.Conv2d | nn.Linear] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        if isinstance(module, SUPPORTED):
            modules[name] = module
    return modules


def preset_targets(model: nn.Module, preset: str) -> set[str]:
    """Names of the layers that a preset ("conv", "attention" or "all") means in this model."""
    targets = set()
    for name, module in supported_modules(model).items():
        has_kernel = module.weight.ndim > 2 and module.weight.shape[2:].numel() > 1
        projects = isinstance(module, nn.Linear) and ATTENTION_PROJECTIONS.fullmatch(name) is not None
        if (has_kernel and preset != "attention") or (projects and preset != "conv"):
            targets.add(name)
    return targets


def find_atom_layer(module: nn.Module) -> AtomLayer | None:
    """The atom layer among the adapter layers that wrap one another here."""
    inside = module.modules() if isinstance(module, BaseTunerLayer) else ()
    return next((layer for layer in inside if isinstance(layer, AtomLayer)), None)


def _new_layer(target: Any, name: str) -> AtomLayer:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, SUPPORTED):
        names = " and ".join(supported.__name__ for supported in SUPPORTED)
        raise TypeError(f"{name} is a {type(base).__name__}; atoms adapt {names}: leave it out of target_modules")
    if not base.weight.is_floating_point():
        raise TypeError(f"the weight of {name} is {base.weight.dtype}; atoms adapt floating-point weights only")
    return AtomLayer(target)
