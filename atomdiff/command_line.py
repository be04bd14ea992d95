"""A frozen dataclass as a command line: one `--option` a field, help from the field docstrings, YAML by `--config`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    positional: str | None = None,
) -> Config:
    """Build a config from the command line and from the YAML files named by `--config`; what comes later wins.

    Fields of type `tuple[X, ...]` take one or more values, as in `--seeds 0 1 2`; a truth value's option alone means
    true. Options and YAML keys that are no fields, values of a wrong type and missing fields end the program with one
    line that says so.

    Args:
        config_class: a dataclass whose fields have docstrings.
        args: the command line without the program's name; by default that of this process.
        prog: the program's name in the messages.
        positional: a field that is given without its name.

    Raises:
        UserError: from the config's own checks.
        SystemExit: with that line.
    """
    parser = _parser(config_class, prog, positional)
    values = vars(parser.parse_args(None if args is None else list(args)))
    hints = get_type_hints(config_class)
    fields = {field.name: values[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(**{k: tuple(v) if get_origin(hints[k]) is tuple else v for k, v in fields.items()})


class _Parser(ArgumentParser):
    """An argument parser that reports a mistake without the usage of every option before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with the message on one line."""
        said = " ".join(message.split()).rstrip(".")
        raise SystemExit(f"{self.prog}: error: {said}. --help lists the options")


def _parser(config_class: type[Any], prog: str | None, positional: str | None) -> ArgumentParser:
    docstring = parse_from_object(config_class)
    helps = {entry.arg_name: entry.description for entry in docstring.params}
    hints = get_type_hints(config_class)
    parser = _Parser(prog=prog, description=docstring.short_description)
    if "config" not in hints:  # a field of that name is something else
        parser.add_argument("--config", action="config", help="A YAML file with any of the options below.")
    for field in dataclasses.fields(config_class):
        options: dict[str, Any] = {"type": hints[field.name], "help": helps[field.name]}
        if get_origin(hints[field.name]) is tuple:
            options |= {"type": get_args(hints[field.name])[0], "nargs": "+"}
        if hints[field.name] in (bool, bool | None):
            options |= {"nargs": "?", "const": True}
        required = field.default is dataclasses.MISSING
        if not required:
            options["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        if field.name != positional:
            parser.add_argument(f"--{field.name}", required=required, **options)
        else:
            parser.add_argument(field.name, **options | ({} if required else {"nargs": "?"}))
    return parser
