"""Make PEFT know the tuner: the one place that works around PEFT's closed registry."""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "atoms"
PREFIX = "atom_"


def register() -> Any:
    """Register the tuner with PEFT, once, and return its `PeftType`.

    `register_peft_method` takes only names that are members of the `PeftType` enum, so the member is added first.
    """
    if NAME.upper() not in PeftType.__members__:
        _add_enum_member(NAME.upper())
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    member = PeftType.__members__[NAME.upper()]
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        from atomdiff.tuner.config import AtomConfig
        from atomdiff.tuner.model import AtomModel

        register_peft_method(name=NAME, config_cls=AtomConfig, model_cls=AtomModel, prefix=PREFIX)
    return member


def _add_enum_member(name: str) -> None:
    """Add a member to the string enum as its own class body would have."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Attribute access reads the member map up to Python 3.11 and a class attribute from 3.12 on.
    type.__setattr__(PeftType, name, member)
