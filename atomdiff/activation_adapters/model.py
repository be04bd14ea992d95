"""The PEFT tuner of a method that adds to activations."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import NoMatchingPeftModuleError
from torch import nn

from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.tuner.model import base_modules, forget_config
from atomdiff.tuner.slots import remove_empty_slots

_NAMED_SHOWN = 4


class ActivationModel(BaseTuner):
    """Finds the modules that are meant; a method says which it can adapt, and adds its adapter to one."""

    target_module_mapping: dict[str, list[str]] = {}

    def why_not(self, config: Any, module: nn.Module, model: nn.Module) -> str:
        """Why the method cannot adapt a module; empty: it can."""
        raise NotImplementedError

    def in_preset(self, config: Any, module: nn.Module) -> bool:
        """Whether the preset means a module that the method can adapt."""
        return True

    def has_place(self, config: Any, path: str, module: Any) -> bool:
        """Whether a module that the method can adapt has a place for an adapter that is not excluded."""
        return True

    def add_to(self, config: Any, adapter_name: str, path: str, module: Any, parent: nn.Module) -> list[Any]:
        """Add an adapter to a module, and return the layers that have it."""
        raise NotImplementedError

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse what cannot work before a layer updates, and leave no name of it behind."""
        try:
            self._targets = self._find_targets(peft_config, model)
        except (ValueError, TypeError):
            forget_config(model, peft_config)
            raise

    def _find_targets(self, config: ActivationConfig, model: nn.Module) -> set[str]:
        modules = dict(base_modules(model))
        reasons = {path: self.why_not(config, module, model) for path, module in modules.items()}
        able = [path for path, reason in reasons.items() if not reason]
        preset = [path for path in able if self.in_preset(config, modules[path])]
        candidates = preset if config.target_modules == config.preset else list(modules)
        targets = {path for path in candidates if config.match(path)}
        if wrong := sorted(path for path in targets if reasons[path]):
            raise TypeError(f"{config.METHOD} cannot adapt {wrong[0]}: {reasons[wrong[0]]}")
        targets = {path for path in targets if self.has_place(config, path, modules[path])}
        if not targets:
            excluded = f" but for exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
            names = ", ".join(able[:_NAMED_SHOWN]) + (", ..." if len(able) > _NAMED_SHOWN else "")
            raise NoMatchingPeftModuleError(
                f"target_modules={config.target_modules!r}{excluded} matches nothing in this {type(model).__name__} "
                f"that {config.METHOD} adapts; it could adapt: {names or 'nothing'}"
            )
        return targets

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return _ExcludedModule() if peft_config.excludes(key) else key in self._targets

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
        for layer in self.add_to(peft_config, adapter_name, current_key, target, parent):
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key of a tensor in files; PEFT's own looks for the name at the end of keys only."""
        (kind,) = cls.tuner_layer_cls.adapter_layer_names
        return key.replace(f".{kind}.{adapter_name}.", f".{kind}.")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put back what a layer stood for; PEFT's own would look for a weight."""
        setattr(parent, child_name, new_module)
        remove_empty_slots(parent)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU where they have no memory, as those that are offloaded."""
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))
