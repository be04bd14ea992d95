"""Add an adapter of any PEFT method to the layers of a model, as PEFT's own tuner does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_state import adapter_configs, adapter_layers, is_atoms
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.dry_run import copy_structure
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.model import refuse_fused
from atomdiff.tuner.shared_state import is_shared, share_state
from atomdiff.tuner.slots import remove_empty_slots


def inject(model: Any, config: PeftConfig, name: str) -> None:
    """As PEFT's `inject_adapter_in_model`, also for methods whose layers share tensors.

    There is no warning that a model gets several adapters, and the layers train or not as their base does.

    Raises:
        ValueError: the adapter does not fit the model, or is more than layers.
    """
    merged = [(layer, layer.merged_adapters) for layer in adapter_layers(model).values() if layer.merged]
    for layer, _ in merged:
        layer.merged_adapters = []  # PEFT would unmerge these layers, others than atoms in their own inexact way
    configs = {**adapter_configs(model), name: config}
    try:
        # PEFT compares the settings of adapters as if all were of one method.
        alike = {each: other for each, other in configs.items() if type(other) is type(config)}
        with nullcontext() if is_atoms(config) else _base_weights(model):
            tuner = quiet_tuner(config)(model, alike, adapter_name=name)
    except KeyError as error:
        if len(configs) == 1:
            raise
        method = cast(Any, config).peft_type.value
        raise ValueError(f"{method} does not find the layer {error} below other adapters: load it first") from error
    finally:
        for layer, names in merged:
            layer.merged_adapters = names
    set_adapter_configs(model, configs)
    model._hf_peft_config_loaded = True  # what diffusers and transformers look at
    for layer in adapter_layers(model, name).values():
        layer.train(layer.get_base_layer().training)  # or dropout would act on images
    if not is_shared(tuner, model):
        raise _more_than_layers(config)


def _more_than_layers(config: Any) -> ValueError:
    return ValueError(f"{config.peft_type} adapters are more than layers: use peft.get_peft_model")


def quiet_tuner(config: Any) -> Any:
    """The PEFT tuner of a method; it takes the settings of all adapters from its caller, not from the model."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or config.is_prompt_learning or config.is_adaption_prompt:
        raise _more_than_layers(config)

    class Quiet(tuner):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            if name == "peft_config":  # where the model has one, PEFT warns of several adapters
                raise AttributeError(name)
            return super().__getattr__(name)

        def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
            if tuner._pre_injection_hook is BaseTuner._pre_injection_hook:
                return
            self.model = _without_adapters(model)  # some methods measure its layers
            super()._pre_injection_hook(self.model, config, adapter_name)
            self.model = model
            share_state(self, model)

    return Quiet


@contextmanager
def _base_weights(model: nn.Module) -> Iterator[None]:
    """Let a method that computes something from weights see them as they are without what is merged into them."""
    bases = [BaseWeight(module) for _, module in weight_access.walk(model)]
    kept = [base for base in bases if base.copy is not None or base.offloaded is not None]
    weights = [(cast(Tensor, base.module.weight), base.read().detach()) for base in kept]
    weights = [(weight, base) for weight, base in weights if not weight.is_meta]
    merged = [weight.data for weight, _ in weights]
    try:
        for weight, base in weights:
            weight.data = base
        yield
    finally:
        for (weight, _), data in zip(weights, merged, strict=True):
            weight.data = data


def _without_adapters(model: nn.Module) -> nn.Module:
    """The base below all adapters, as far as its modules can be looked at."""
    copied = copy_structure(model)
    for path, layer in reversed(weight_access.walk(copied)):
        if isinstance(layer, BaseTunerLayer):
            unwrap(copied, path, layer)
    return copied


def unwrap(model: nn.Module, path: str, layer: Any) -> None:
    """Put the base layer of an adapter layer back in its place."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, layer.base_layer)
    remove_empty_slots(parent)
    if not any(isinstance(child, AtomLayer) for child in parent.children()):
        for key in [key for key, hook in parent._forward_pre_hooks.items() if hook is refuse_fused]:
            del parent._forward_pre_hooks[key]


def set_adapter_configs(model: Any, configs: dict[str, Any]) -> None:
    """Set the record of adapters that PEFT, diffusers and transformers read; without any, there is no record."""
    if configs:
        model.peft_config = configs
        return
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)
