"""Command lines from dataclasses: an `--option` for each field, help from its docstring, YAML files by `--config`."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter  # type: ignore[attr-defined]

from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import OneOf, marked_fields
from atomdiff.utils.paths import expand_path, path_fields
from atomdiff.utils.text_files import read_yaml

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    positional: str | None = None,
) -> Config:
    """Build a config from the command line and from the YAML files named by `--config`; what comes later wins.

    Fields of type `tuple[X, ...]` take one or more values, as in `--seeds 0 1 2`; the option of a bool alone means
    true. `none` and `null` mean None where a field may be None; bools may also be `yes`, `no`, `on` and `off`. Unknown
    options and YAML keys, values of a wrong type and missing fields end the program with one line that says so.

    Args:
        config_class: A dataclass whose fields have docstrings.
        args: The command line without the program's name; by default that of this process.
        prog: The program's name in messages.
        positional: A field that is given without its name.

    Raises:
        UserError: from the config's own checks, or a file of `--config` cannot be read.
        SystemExit: with that line.
    """
    return config_class(**parse_values(config_class, args, prog=prog, positional=positional))


def parse_values(
    config_class: type[Any],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    positional: str | None = None,
) -> dict[str, Any]:
    """Return the values that `parse_config` builds a config from, which its own checks have not seen."""
    hints = get_type_hints(config_class)
    parser = _parser(config_class, prog, positional)
    values = vars(parser.parse_args(_normalize_arguments(sys.argv[1:] if args is None else args, hints)))
    fields = {field.name: values[field.name] for field in dataclasses.fields(config_class)}
    return {k: tuple(v) if get_origin(hints[k]) is tuple else v for k, v in fields.items()}


def parse_with_overrides(
    config_class: type[Config], args: Sequence[str] | None = None, *, prog: str | None = None
) -> Config:
    """Build a config with a field `adapter`; the overrides.yaml beside that JSON file, if it is one, sets defaults.

    Values come, the later ones winning, from the defaults, from overrides.yaml (what a method needs its own value for,
    such as its learning rate), and from the command line in its order. Where `--adapter` comes after all `--config`
    files, overrides.yaml comes after them, too: what they set was meant for another adapter.

    Args:
        config_class: A dataclass whose fields have docstrings, among them `adapter`.
        args: The command line without the program's name; by default that of this process.
        prog: The program's name in messages.

    Raises:
        UserError: from the config's own checks, or a file of `--config` cannot be read.
        SystemExit: as for `parse_config`.
    """
    return config_class(**parse_values_with_overrides(config_class, args, prog=prog))


def parse_values_with_overrides(
    config_class: type[Any], args: Sequence[str] | None = None, *, prog: str | None = None
) -> dict[str, Any]:
    """Return the values that `parse_with_overrides` builds a config from, which its own checks have not seen."""
    args = sys.argv[1:] if args is None else list(args)
    values = parse_values(config_class, args, prog=prog)
    adapter = Path(find_asset(expand_path(values["adapter"], "adapter")))
    overrides = adapter.with_name("overrides.yaml")
    if adapter.is_file() and overrides.is_file():
        place = _end_of_configs(args)
        return parse_values(config_class, [*args[:place], "--config", str(overrides), *args[place:]], prog=prog)
    return values


def _end_of_configs(args: Sequence[str]) -> int:
    """Where the last `--config` of a command line ends, if `--adapter` comes after it; else 0."""
    names = [argument.partition("=")[0] for argument in args]
    end = max((i + (1 if "=" in args[i] else 2) for i, name in enumerate(names) if name == "--config"), default=0)
    return end if "--adapter" in names[end:] else 0


def read_cell(text: str, hint: Any) -> Any:
    """Return the value that a text stands for in a field of a type; a text that stands for none stays as it is.

    Args:
        text: as it would stand on a command line, such as `1e-3`, `yes` or `none`.
        hint: the type, without `Annotated`.
    """
    value = _normalize(text, hint)
    for number in (int, float):
        if number in (hint, *get_args(hint)):
            with contextlib.suppress(TypeError, ValueError):
                return number(value)
    return (value,) if get_origin(hint) is tuple else value


def _normalize_arguments(args: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """Spell the values of options as the parser expects them."""
    normalized: list[str] = []
    hint: Any = str
    for argument in args:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            hint = hints.get(name[2:], str)
            normalized.append(f"{name}={_normalize_argument(value, hint)}" if equals else argument)
        else:
            normalized.append(_normalize_argument(argument, hint))
    return normalized


def _normalize_argument(text: str, hint: Any) -> str:
    value = _normalize(text, hint)
    return value if isinstance(value, str) else json.dumps(value)


def _normalize(value: Any, hint: Any) -> Any:
    """Return None, true, false or a whole number for what stands for it in a field of that type; else the value."""
    types = (hint, *get_args(hint))
    if isinstance(value, str):
        if value.lower() in ("none", "null") and type(None) in types:
            return None
        if value.lower() in _TRUTH and bool in types:
            return _TRUTH[value.lower()]
    if int in types and float not in types and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):  # 1e3 and 1000.0 are whole numbers
            return int(float(value)) if float(value).is_integer() and not str(value).isdecimal() else value
    return value


class _ConfigFile(ActionConfigFile):
    """Reads a YAML file of options."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Put the options of the file over those that came before."""
        try:
            options = _read_options(find_asset(expand_path(values, "config")), parser.hints)
        except UserError as error:
            parser.error(str(error))
        quoted = yaml.safe_dump(options, default_style='"')  # so that YAML does not guess types
        self.apply_config(parser, cfg, self.dest, quoted)


def _read_options(file: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UserError: The file cannot be read, or does not hold options.
    """
    content = read_yaml(file)
    options = {} if content is None else content
    if not isinstance(options, dict):
        raise UserError(f"{file}: expected a mapping with one option per line, such as seed: 0")
    for name, value in options.items():
        if name not in hints:
            raise UserError(f"{file}: there is no option {name!r}")
        several = get_origin(hints[name]) is tuple
        options[name] = [value] if several and not isinstance(value, list) else _normalize(value, hints[name])
        if options[name] in (None, [None]) and type(None) not in get_args(hints[name]):
            raise UserError(f"{file}: {name} has no value; write one, or leave the line out for the default")
    return options


_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


class _HelpFormatter(DefaultHelpFormatter):
    """Shows the help as it is: types and defaults are in it."""

    def _get_help_string(self, action: Any) -> str:
        return _OWN_HELP.get(action.dest, action.help or "")


_OWN_HELP = {"help": "Show this help and exit.", "print_config": "Print the options as YAML and exit."}


class _Parser(ArgumentParser):
    """An argument parser that reports a mistake without the usage of every option before it."""

    hints: dict[str, Any]
    """The types of the config's fields."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with the message on one line."""
        line = " ".join(message.split()).rstrip(".")
        raise SystemExit(f"{self.prog}: error: {line}. --help lists the options")


def _parser(config_class: type[Any], prog: str | None, positional: str | None) -> ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"%(prog)s [OPTIONS]{f' [{positional}]' if positional else ''}",
        description=parse_from_object(config_class).short_description,
        formatter_class=_HelpFormatter,
    )
    helps = _helps(config_class)
    hints = get_type_hints(config_class)
    for name, one_of in marked_fields(config_class, OneOf).items():
        hints[name] = Literal[tuple(one_of.table)]
    parser.hints = hints
    if "config" not in hints:  # a field of that name is something else
        parser.add_argument(
            "--config",
            action=_ConfigFile,
            metavar="PATH",
            help="YAML file with options; may be given several times, later ones win.",
        )
    paths = path_fields(config_class)
    sections: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(config_class):
        option = _option(field, hints[field.name], helps[field.name])
        if field.name == positional:
            parser.add_argument(field.name, **option | ({"nargs": "?"} if "default" in option else {}))
            continue
        title = _section(config_class, field.name)
        section = sections[title] = sections.get(title) or parser.add_argument_group(title)
        metavar = "PATH" if field.name in paths else _metavar(hints[field.name])
        section.add_argument(f"--{field.name}", required="default" not in option, metavar=metavar, **option)
    return parser


def _option(field: dataclasses.Field[Any], hint: Any, text: str) -> dict[str, Any]:
    """Return the parser's arguments for a field."""
    option: dict[str, Any] = {"type": hint, "help": text}
    if get_origin(hint) is tuple:
        option |= {"type": get_args(hint)[0], "nargs": "+"}
    if hint in (bool, bool | None):
        option |= {"nargs": "?", "const": True}
    default = field.default
    if default is dataclasses.MISSING:
        return option | {"help": f"{text} (required)"}
    defaults = default if isinstance(default, tuple) else () if default is None else (default,)
    if defaults and default is not False and default != "":
        option["help"] += f" (default: {', '.join(map(str, defaults))})"
    return option | {"default": list(default) if isinstance(default, tuple) else default}


def _helps(config_class: type[Any]) -> dict[str, str]:
    """Return the help of each field: its docstring, and what it may be if that is in a table."""
    groups = [group for group in reversed(config_class.__mro__) if dataclasses.is_dataclass(group)]
    helps = {entry.arg_name: entry.description or "" for group in groups for entry in parse_from_object(group).params}
    for name, one_of in marked_fields(config_class, OneOf).items():
        helps[name] += " " + "; ".join(f"{choice}: {entry.help}" for choice, entry in one_of.table.items()) + "."
    return helps


def _section(config_class: type[Any], name: str) -> str:
    """Return the title under which `--help` lists a field: that of the group it comes from; none for its own."""
    owner = next(group for group in reversed(config_class.__mro__) if name in vars(group).get("__annotations__", {}))
    return "" if owner is config_class else (parse_from_object(owner).short_description or "").rstrip(".")


def _metavar(hint: Any) -> str:
    """Return how `--help` shows the values of a type."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    return _METAVARS.get(hint) or next(map(_metavar, get_args(hint)), "TEXT")


_METAVARS = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT"}
