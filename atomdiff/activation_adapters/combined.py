"""Adapters of several methods that are one: trained, saved, loaded, weighted and taken out together."""

from __future__ import annotations

from abc import ABCMeta
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from atomdiff.activation_adapters.coeff_tuning import CoeffTuningLayer, CoeffTuningModel
from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.activation_adapters.conv_adapter.layer import ConvAdapterLayer
from atomdiff.activation_adapters.conv_adapter.model import ConvAdapterModel
from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.activation_adapters.model import ActivationModel
from atomdiff.activation_adapters.mona.layer import MonaLayer
from atomdiff.activation_adapters.mona.model import MonaModel
from atomdiff.tuner.attach import delete_adapter
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.inject import quiet_tuner
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.peft_type import add_member
from atomdiff.tuner.read_config import unknown_fields
from atomdiff.tuner.removable import why_not_removable

_ALONE = {"select": "all", "share": None}  # fields of atoms that what is written of them depends on


@dataclass
class CombinedConfig(PeftConfig):
    """Adapters of several methods as one: atoms and adapters of activations, one of a method.

    Raises:
        ValueError: a field has a value that it may not have.
    """

    METHOD: ClassVar[str] = "COMBINED"

    methods: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "The settings of each adapter, with its peft_type, as an adapter.json has them."},
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()
        self.peft_type = add_member(self.METHOD)
        self.filled_by_loader = False  # as that of `AtomConfig`; never stored
        if not isinstance(self.methods, (list, tuple)) or len(self.methods) < 2:
            raise ValueError(f"methods={self.methods!r:.100}: expected a list of settings of two or more adapters")
        self.methods = [dict(each) if isinstance(each, dict) else each for each in self.methods]
        names = [cast(Any, part).peft_type.value for part in self.parts()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"methods: found {names.count(twice[0])} of {twice[0]}, expected one of each method")

    def parts(self) -> list[PeftConfig]:
        """The settings of each adapter."""
        parts = [_read_part(number, fields) for number, fields in enumerate(self.methods)]
        for part in parts:
            part.inference_mode = self.inference_mode
            if isinstance(part, AtomConfig):
                part.filled_by_loader = self.filled_by_loader
        return parts


def _read_part(number: int, fields: Any) -> PeftConfig:
    what = f"methods[{number}]"
    method = fields.get("peft_type") if isinstance(fields, dict) else None
    able = {
        str(getattr(name, "value", name)): kind
        for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if issubclass(kind, (AtomConfig, ActivationConfig))
    }
    kind: Any = able.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ValueError(f"{what}: found peft_type={method!r:.100}, expected one of {', '.join(sorted(able))}")
    if unknown := unknown_fields(kind, fields):
        raise ValueError(f"{what}: {unknown}")
    try:
        part: PeftConfig = kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    if change := why_not_removable(part):
        raise ValueError(f"{what}: {change}")
    for name, allowed in _ALONE.items() if isinstance(part, AtomConfig) else ():
        if (value := getattr(part, name)) != allowed:
            raise ValueError(f"{what}: {name}={value!r}: expected {allowed!r} beside other adapters")
    return part


class CombinedLayer(metaclass=ABCMeta):  # noqa: B024 - it only stands for those that are registered
    """What layers of adapters are that can be combined, and what they may have by the name of an adapter."""

    _layers = (AtomLayer, MonaLayer, ConvAdapterLayer, CoeffTuningLayer)
    adapter_layer_names = tuple(name for layer in _layers for name in layer.adapter_layer_names)
    other_param_names = tuple(dict.fromkeys(name for layer in _layers for name in layer.other_param_names))


CombinedLayer.register(AtomLayer)
CombinedLayer.register(ActivationLayer)


class CombinedModel(BaseTuner):
    """Adds adapters of several methods under one name; use it by `get_peft_model(model, CombinedConfig(...))`."""

    prefix = "combined_"
    tuner_layer_cls = CombinedLayer
    target_module_mapping: dict[str, list[str]] = {}

    _replace_module = ActivationModel._replace_module

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapters one after another; where one does not fit, none is left."""
        configs = self.peft_config  # which may be the model's record, that other tuners set
        try:
            for part in configs[adapter_name].parts():
                quiet_tuner(part)(model, {adapter_name: part}, adapter_name=adapter_name)
        except Exception:
            model.peft_config = configs
            delete_adapter(model, adapter_name)
            raise
        model.peft_config = configs
        self.set_adapter(self.active_adapters, inference_mode=configs[adapter_name].inference_mode)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        raise ValueError(
            "what adapters of activations add depends on its input, so there is no weight to merge it into"
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for method in (MonaModel, ConvAdapterModel, CoeffTuningModel):
            if (shorter := method._remove_adapter_name_from_key(key, adapter_name)) != key:
                return shorter
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    def _create_and_replace(self, *_: Any, **__: Any) -> nn.Module:
        raise NotImplementedError  # the tuners of the methods do it
