"""Text files of users: captions, prompts, and configs in YAML or JSON, in whatever encoding an editor saved them."""

import codecs
import contextlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from atomdiff.utils.errors import UserError

_MARKS = {  # byte-order marks -> the encoding that they announce; UTF-32's begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ADVICE = "save it as UTF-8"
_MERGE = "tag:yaml.org,2002:merge"


def read_text(file: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-8, UTF-16 or UTF-32 with a byte-order mark; line ends become newlines.

    Raises:
        UserError: it cannot be read, or is not such text; the message names the file.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte {content[error.start] if error.start < len(content) else 0:#04x} at offset {error.start}"
        what = encoding.removesuffix("-sig").upper()
        expected = "expected UTF-8, or UTF-16 with a byte-order mark"
        raise UserError(f"{file}: not text in {what} ({found}); {expected}: {_ADVICE}") from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        raise UserError(
            f"{file}: not text in UTF-8 (it has null characters, like UTF-16 without a byte-order mark): {_ADVICE}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_text(what: str, text: str) -> None:
    """Check a text of a command line or a request, which may have bytes or halves of characters that are no text.

    Args:
        what: the text's name and value, for the message.
        text: the text.

    Raises:
        UserError: it cannot be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{what}: found {text[error.start : error.end]!r}, which is no character"
        raise UserError(f"{found}; expected text in UTF-8") from error


def read_yaml(file: str | Path) -> Any:
    """Read a YAML or JSON file; 1e-4 is a number in it, and a key that appears twice in a mapping is an error.

    Only `true` and `false` are truth values, as in YAML 1.2: who writes `no` may mean a word.

    Raises:
        UserError: it cannot be read; the message names the file.
    """
    return parse_yaml(read_text(file), str(file))


def parse_yaml(text: str, name: str) -> Any:
    """Read a text as `read_yaml` reads a file.

    Raises:
        UserError: it cannot be read; the message begins with `name`.
    """
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read as YAML or JSON ({' '.join(str(error).split())})") from error


def _load(text: str) -> Any:
    with contextlib.suppress(json.JSONDecodeError, RecursionError):  # YAML takes neither tabs nor pairs of surrogates
        return json.loads(text, object_pairs_hook=_mapping)
    return yaml.load(text, Loader=_Loader)


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{repeated[0]!r} appears twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """YAML with the plain values of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse keys that stand twice; the last would win without a word."""
        _mapping([(self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE])
        return super().construct_mapping(node, deep)


_INT = "tag:yaml.org,2002:int"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    (_MERGE, r"<<", "<"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))  # 010 is ten
