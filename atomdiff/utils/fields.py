"""Config dataclasses whose fields say in their types what they may be: numbers in a range, names of a table, paths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import InputPath, expand_paths

Mark = TypeVar("Mark")

_PLAIN: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes."""

    least: float
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value < self.below

    def __str__(self) -> str:
        most = f" and at most {self.most:.12g}" if self.most < math.inf else ""
        return f"at least {self.least:.12g}{most}" + (f" and below {self.below:.12g}" if self.below < math.inf else "")


@dataclass(frozen=True)
class OneOf:
    """A field that names an entry of a table; `--help` shows the `help` of each."""

    table: Mapping[str, Any]


@dataclass(frozen=True)
class NeedsPackage:
    """A field that needs a package when it is set."""

    package: str
    extra: str


@dataclass(frozen=True)
class MustExist:
    """A path where something has to be."""


PositiveInt = Annotated[int, Range(1, below=10**9)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(1e-9)]
BatchSize = Annotated[int, Range(1, 100_000)]
Share = Annotated[float, Range(0, below=1)]
ExistingPath = Annotated[InputPath, MustExist()]


@dataclass(frozen=True, kw_only=True)
class ConfigGroup:
    """Fields that belong together, with their checks; a config inherits from all groups that it is made of.

    A group's method `check` tells what does not go together; it runs after the fields have been checked one by one.

    Raises:
        UserError: A field has a value that cannot be used; the message names field, value and what is allowed.
    """

    def __post_init__(self) -> None:
        expand_paths(self)
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            _check_field(name, hint, getattr(self, name))
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                vars(group)["check"](self)


def marks(hint: Any, kind: type[Mark]) -> list[Mark]:
    """Return what of a kind is annotated to a type, or to a part of it, as in `Annotated[int, Range(1)] | None`."""
    if isinstance(hint, kind):
        return [hint]
    return [mark for part in get_args(hint) for mark in marks(part, kind)]


def marked_fields(config_class: type[Any], kind: type[Mark]) -> dict[str, Mark]:
    """Return the fields of a config with such a mark."""
    hints = get_type_hints(config_class, include_extras=True)
    return {name: first[0] for name, hint in hints.items() if (first := marks(hint, kind))}


def _check_field(name: str, hint: Any, value: Any) -> None:
    optional = type(None) in get_args(hint)
    if value is None and optional:
        return
    several = get_origin(hint) is tuple
    if several and not isinstance(value, (tuple, list)):
        raise UserError(f"{name}={value!r}: expected a tuple, such as ({value!r},)")
    if plain := _plain_type(hint):
        accepted, expected = _PLAIN[plain]
        for each in value if several else (value,):
            if not isinstance(each, accepted) or isinstance(each, bool) != (plain is bool):
                raise UserError(f"{name}={each!r}: expected {expected}")
    for limits in marks(hint, Range):
        if value not in limits:
            raise UserError(f"{name}={value!r}: expected a number of {limits}")
    if marks(hint, MustExist) and not os.path.exists(value):  # not Path.exists, which raises an error for long names
        raise UserError(f"{name}={value!r}: found nothing there; check the path")
    choices = [choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)]
    choices += [choice for one_of in marks(hint, OneOf) for choice in one_of.table]
    if choices and value not in choices:
        raise UserError(f"{name}={value!r}: expected one of {', '.join(choices)}{' or none' * optional}")


def _plain_type(hint: Any) -> type[Any] | None:
    """Return the type that a field, or each part of a tuple, has; None where there are several, or other than plain."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plain_type(parts[0])
    if origin in (tuple, Union, UnionType):
        types = {_plain_type(part) for part in parts if part not in (type(None), ...)}
        return types.pop() if len(types) == 1 else None
    return hint if hint in _PLAIN else None
