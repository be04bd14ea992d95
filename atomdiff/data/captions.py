"""The captions beside the images of a folder, and the orders of a caption's tags."""

import csv
import io
import itertools
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name
from atomdiff.utils.text_files import read_text
from atomdiff.utils.untrusted import list_some

_SUFFIXES = (".txt", ".caption")
_TABLES = ("metadata.jsonl", "metadata.csv")
_COLUMNS = ("text", "caption", "prompt")
_MAYBE_CAPTIONS = {*_SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xml"}
_OWN_FILES = {"class_images.json", "manifest.json"}  # beside images that atomdiff generated
_MAX_ORDERS = 16  # few enough for the prompt embeddings of all to be computed once


def read_captions(folder: Path, images: Sequence[Path]) -> dict[str, str]:
    """Read the captions of a folder's images.

    That of 01.png stands in 01.txt, 01.caption (kohya), 01.png.txt or 01.png.caption, or in a table: metadata.jsonl or
    metadata.csv with the columns `file_name` and `text`, `caption` or `prompt` (datasets' imagefolder). Suffixes may be
    in upper case; names are compared in one Unicode form.

    Returns:
        Name of an image -> its caption, for those that have one that is not empty.

    Warns:
        UserWarning: there are other files that may have been meant as captions.

    Raises:
        UserError: a file cannot be read, or an image has two captions that differ.
    """
    images_of: dict[str, list[str]] = {}  # by what a file of captions may call them
    for image in images:
        for name in (normalize_name(image.stem), normalize_name(image.name)):
            images_of.setdefault(name, []).append(image.name)
    captions: dict[str, tuple[str, str]] = {}  # and where each stands
    unused = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file() or file.suffix.lower() not in _MAYBE_CAPTIONS:
            continue
        found, not_used = _captions_in(file, images_of)
        unused += not_used
        for image_name, text in found.items():
            first_text, first_file = captions.setdefault(image_name, (text, file.name)) if text else (text, file.name)
            if first_text != text:
                raise UserError(
                    f"{folder}: {image_name} has one caption in {first_file} and another in {file.name}; keep one"
                )
    if unused:
        shown = list_some(unused)
        expected = f"that of 01.png is expected in 01.txt or 01.caption, or in {_TABLES[0]}"
        warnings.warn(f"{folder}: not read, as no caption of an image: {shown}; {expected}", stacklevel=2)
    return {name: text for name, (text, _) in captions.items()}


def _captions_in(file: Path, images_of: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], list[str]]:
    """Return the captions of images in a file, and what in it belongs to no image."""
    if file.name in _TABLES:
        table = list(_read_table(file))
        if captions := {image: text for name, text in table for image in images_of.get(name, ())}:
            strangers = sum(name not in images_of for name, _ in table)
            return captions, [f"{strangers} lines of {file.name}"] if strangers else []
    elif file.suffix.lower() in _SUFFIXES:
        if named := images_of.get(normalize_name(file.name)[: -len(file.suffix)]):
            return dict.fromkeys(named, read_text(file).strip()), []
    return {}, [] if file.name in _OWN_FILES else [file.name]


def _read_table(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of images, in one Unicode form, and their captions."""
    for number, entry in _entries(file):
        columns = [column for column in _COLUMNS if isinstance(entry.get(column), str)]
        if not isinstance(entry.get("file_name"), str) or not columns:
            found = ", ".join(map(str, entry)) or "nothing"
            raise UserError(
                f"{file}: line {number} has {found}; expected file_name, and {', '.join(_COLUMNS[:-1])} or "
                f"{_COLUMNS[-1]}"
            )
        yield normalize_name(entry["file_name"].removeprefix("./")), entry[columns[0]].strip()


def _entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the columns of each line that is not empty."""
    text = read_text(file)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))  # a quoted caption may have several lines
        try:
            yield from ((reader.line_num, entry) for entry in reader)
        except csv.Error as error:
            raise UserError(f"{file}: line {reader.line_num} is not CSV ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is not JSON ({error})") from error
        if entry is not None:
            yield number, entry if isinstance(entry, dict) else {}


def tag_orders(caption: str, keep_tokens: int, seed: int) -> tuple[str, ...]:
    """Return a caption with its comma-separated tags in several orders, each once; if at most 3 can move, in all.

    Args:
        caption: tags such as "sks mug, red, on a table"; one without commas stays alone.
        keep_tokens: how many of the first tags stay where they are.
        seed: chooses 16 of the orders where there are more.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, movable = tags[:keep_tokens], tags[keep_tokens:]
    if len(movable) < 2:
        return (caption,)
    orders: Iterable[Sequence[int]] = itertools.permutations(range(len(movable)))
    if math.factorial(len(movable)) > _MAX_ORDERS:
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(len(movable), generator=generator).tolist() for _ in range(_MAX_ORDERS))
    return tuple(dict.fromkeys(", ".join([*kept, *(movable[i] for i in order)]) for order in orders))
