"""What files from strangers may ask for.

Concepts are shared: a file may come from anybody, damaged or made to do harm. Threat model: whoever wrote the file
controls each of its bytes, and nothing else. Reading it must not

- run code: pickles are not opened, and only safetensors, JSON and images are read;
- open other files, or reach the network: names and paths in a file are only texts;
- take much more memory or time than the file is large, or than a concept of that kind may need: the limits below, and
  regular expressions that can match in only so many ways;
- act on the terminal: texts of a file that a message quotes are short and printable;
- put numbers that are not finite into a model.

A file may still hold a concept that gives bad images. Base models, and Python packages that load them, are trusted.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from atomdiff.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # for types alone: --help does without torch

MAX_FILE_BYTES = 1 << 30  # of a concept
MAX_HEADER_BYTES = 4 << 20  # of any safetensors file; all layers of SDXL in channel blocks of 16 take 2.5 MB
MAX_CONFIG_BYTES = 1 << 20  # of an adapter_config.json
MAX_TRIGGER_WORDS = 64  # of a concept
MAX_TRIGGER_WORD_LENGTH = 100
MAX_SINGULAR_VALUE = 1e60  # beyond all float32 weights; its square is still finite
MAX_TENSOR_ELEMENTS = 1 << 28  # 1 GiB in float32: no layer's adapter has a tensor as large
# A few small tensors can stand for matrices of (row, row) numbers, or for sparse coefficients of (blocks, atoms).
MAX_ROW_LENGTH = 4096
MAX_ATOMS_PER_NUMBER = 8  # times the length of a row
# Regular expressions: how many, how long all together, and in how many ways they may match a name: about two seconds
# for the 700 layers of a large model.
MAX_PATTERNS = 3000
MAX_PATTERN_LENGTH = 200_000
MAX_WAYS = 20_000_000

_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_NAME_LENGTH = 64  # of a module path, about
_MAX_LISTED = 3
_MAX_SHOWN = 300  # characters
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def parse_json(text: str) -> dict[str, Any]:
    """Read a JSON object as programs write it: no key twice, nothing that is no text.

    Raises:
        ValueError: the text is something else.
        RecursionError: it is nested too deeply.
    """
    values = json.loads(text, object_pairs_hook=_without_repeats)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if "\\u" in text:  # halves of characters, which cannot even be printed: a UnicodeEncodeError is a ValueError
        json.dumps(values, ensure_ascii=False).encode()
    return values


def list_some(names: Sequence[str]) -> str:
    """Name the first few of the names, and how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(map(printable, names[:_MAX_LISTED])) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """Return a text from a file as a message quotes it: short, without characters that act on a terminal."""
    text = text[: _MAX_SHOWN + 1]
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def read_safetensors_header(path: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Read metadata and dtypes by key of any safetensors file; takes memory for its header only, whatever that says.

    Raises:
        UserError: the file is damaged or cut off.
    """
    if not os.path.isfile(path):
        found = "is a folder" if os.path.isdir(path) else "is not a file"
        raise UserError(f"{path} {found}; expected a concept file such as mug.atoms.safetensors")
    if str(path).lower().endswith(_PICKLED):
        raise UserError(f"{path} may run code when it is opened, so it is not: convert it to safetensors")
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            room = os.fstat(file.fileno()).st_size - 8
            if size > min(room, MAX_HEADER_BYTES):
                most = f"{MAX_HEADER_BYTES:,} are allowed" if size <= room else f"{max(room, 0):,} follow"
                raise ValueError(f"it is not a safetensors file, or is cut off (a header of {size:,} bytes, {most})")
            header = parse_json(file.read(size).decode())
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata values are not all strings")
        if max((info["data_offsets"][1] for info in header.values()), default=0) != room - size:
            raise ValueError("its header does not fit its contents")
        return metadata, {key: str(info["dtype"]) for key, info in header.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {printable(str(error))}; copy or download it again") from error
    except (RecursionError, TypeError, LookupError) as error:
        raise UserError(f"{path} is damaged: its header is not of safetensors; copy or download it again") from error


def read_finite_tensors(path: Any) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, floating-point ones as float32.

    Raises:
        UserError: the file is damaged, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: _wide(file.get_tensor(key)).clone() for key in sorted(file.keys())}
        broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {printable(str(error))}; copy or download it again") from error
    if broken:
        raise UserError(f"{path} is damaged: {list_some(broken)} holds values that are not finite")
    return tensors


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice in a JSON object")
    return values


def check_patterns(patterns: Iterable[str]) -> None:
    """Check that matching these regular expressions to module names takes no longer than seconds.

    Python tries one way after another in which an expression can match, and a few characters can have more ways than
    there is time.

    Raises:
        ValueError: one is not a regular expression, they are too many, or can match in too many ways.
    """
    patterns = list(patterns)
    few = len(patterns) <= MAX_PATTERNS and sum(map(len, patterns)) <= MAX_PATTERN_LENGTH
    ways = {pattern: _ways_of(pattern) for pattern in patterns} if few else {}
    if not few or sum(ways.values()) > MAX_WAYS:
        example = max(ways, key=ways.__getitem__) if few else patterns[0]
        raise ValueError(
            f"{len(patterns)} regular expression(s) such as {example!r} would take too long to match: repeat nothing "
            f"within a repeated group, use few repetitions in all, and at most {MAX_PATTERNS} expressions"
        )


def _ways_of(pattern: str) -> float:
    try:
        return _ways(_parser.parse(pattern))
    except RecursionError:
        return math.inf
    except (re.error, OverflowError) as error:  # together with what is put around it, it could be one after all
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _ways(parts: Any) -> float:
    """Return at most how many ways a parsed regular expression has to match the start of a name."""
    total = 1.0
    for operation, value in parts:
        kind = str(operation)
        if kind == "BRANCH":
            total *= sum(map(_ways, value[1]))
        elif kind.endswith("_REPEAT"):
            least, most, body = value
            most = min(int(most), _NAME_LENGTH)
            inner = min(_ways(body), 2.0 * MAX_WAYS)
            total *= sum(inner ** min(count, 30) for count in range(min(int(least), most), most + 1))  # stays finite
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP", "GROUPREF_EXISTS"):
            inside = [part for part in (value if isinstance(value, tuple) else [value]) if hasattr(part, "getwidth")]
            total *= sum(map(_ways, inside))
        if total > MAX_WAYS:
            break
    return total
