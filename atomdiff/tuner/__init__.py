"""Filter atoms as a PEFT tuner."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.model import AtomModel
from atomdiff.tuner.peft_type import ATOMS, NAME, PREFIX

__all__ = ["AtomConfig", "AtomLayer", "AtomModel"]

if ATOMS not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME, config_cls=AtomConfig, model_cls=AtomModel, prefix=PREFIX)
