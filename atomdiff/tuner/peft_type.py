"""The method's member in PEFT's list of methods, which takes none from outside."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

NAME = "atoms"
PREFIX = "atom_"


def add_member(name: str) -> Any:
    """The member of PEFT's string enum of that name, added as its own class body would have where it is missing."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Attribute access reads the member map up to Python 3.11 and a class attribute from 3.12 on.
    type.__setattr__(PeftType, name, member)
    return member


ATOMS = add_member(NAME.upper())
