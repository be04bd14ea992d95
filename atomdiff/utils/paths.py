"""Paths as a shell takes them: `~` and environment variables, in every config field that names a file or folder."""

import contextlib
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError

_MARK, _INPUT = object(), object()
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")

PathText = Annotated[str, _MARK]
"""The type of a config's field that names a file or a folder; `expand_paths` replaces what a shell would replace."""
InputPath = Annotated[PathText, _INPUT]
"""A `PathText` that is read only: `samples/...` and `configs/...` that are not here are those of the project."""


def expand_paths(config: Any) -> None:
    """Replace `~` and environment variables in the fields of a frozen dataclass that are `PathText`, or tuples of it.

    What is an `InputPath`, too, is looked up among the files of the project if it is not there.

    Raises:
        UserError: as `expand_path`.
    """
    for name, hint in _path_hints(type(config)).items():
        value = getattr(config, name)
        find = find_asset if _has(hint, _INPUT) else str
        expanded = (
            tuple(find(expand_path(each, name)) for each in value)
            if isinstance(value, (tuple, list))
            else value and find(expand_path(value, name))
        )
        if expanded == "":
            raise UserError(f"{name}='': expected a path; leave it out for the default")
        object.__setattr__(config, name, expanded)


def path_fields(config_class: type[Any]) -> list[str]:
    """Return the fields of a dataclass that are `PathText`, or tuples of it."""
    return list(_path_hints(config_class))


def _path_hints(config_class: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(config_class, include_extras=True)
    return {name: hint for name, hint in hints.items() if _has(hint, _MARK)}


def expand_path(path: str | os.PathLike[str], name: str) -> str:
    """Replace a leading `~` or `~user`, and `$VARIABLE` or `${VARIABLE}`; what is there as written stays as it is.

    Args:
        path: a path.
        name: what it is called in messages.

    Raises:
        UserError: there is no such variable, or no such user, or it cannot be a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"{name}={path!r}: expected a path")
    text = os.fspath(path)
    if (_VARIABLE.search(text) or text.startswith("~")) and not os.path.lexists(text):
        text = _expanded(text, name)
    _resolved(text, name)
    return text


def _expanded(text: str, name: str) -> str:
    missing = [one or other for one, other in _VARIABLE.findall(text) if (one or other) not in os.environ]
    if missing:
        raise UserError(
            f"{name}={text!r}: found no environment variable {missing[0]}; set it, or write the path itself"
        )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        raise UserError(f"{name}={text!r}: found no user {Path(expanded).parts[0][1:]!r}; write the path itself")
    return expanded


def _has(hint: Any, mark: object) -> bool:
    return any(part is mark or _has(part, mark) for part in (*get_args(hint), *getattr(hint, "__metadata__", ())))


def refuse_overlap(writes: Mapping[str, str | Path], reads: Mapping[str, str | Path], inside: bool = True) -> None:
    """Refuse to write to what is read.

    Args:
        writes: what each is called -> a file or folder that is written.
        reads: what each is called -> a file or folder that is read.
        inside: whether a folder is read with all that is in it, and one that is not there may be elsewhere.

    Raises:
        UserError: two are the same, or one that is written is inside one that is read.
    """
    for output, written in writes.items():
        target = _resolved(written, output)
        for source, read in reads.items():
            origin = _resolved(read, source)
            if inside and not origin.exists():  # it may be on the Hub
                continue
            if target == origin or (target.exists() and origin.exists() and target.samefile(origin)):
                mixed = "what is written there would mix with what is read; name another"
                raise UserError(f"{output}={str(written)!r} is {source}, too: {mixed}")
            if inside and origin.is_dir() and target.is_relative_to(origin):
                raise UserError(f"{output}={str(written)!r} is inside {source} ({read}); name another")


def check_empty(folder: str | os.PathLike[str], what: str) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Args:
        folder: the path.
        what: what it is called in messages.

    Raises:
        UserError: it exists, or cannot be a path.
    """
    path = _resolved(folder, what)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{what}={str(folder)!r} exists already: give a new or empty folder")


def _resolved(path: str | os.PathLike[str], what: str) -> Path:
    try:
        resolved = Path(path).resolve()
        resolved.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with null characters, or a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}={str(path)!r:.200}: cannot be a path ({reason}); name another") from error
    return resolved


def check_writable(folder: Path, what: str, name: str = "probe") -> None:
    """Make a folder, and try whether a file of that name can be written in it.

    Raises:
        UserError: it cannot; `what` stands first in the message.
    """
    probe = folder / f"{uuid.uuid4().hex}.unfinished"  # as files are written, under another name first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder / name)  # fails where there can be no such name
    except (OSError, ValueError) as error:  # of null characters in names
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: {name} cannot be written there ({reason}); name another folder") from error
