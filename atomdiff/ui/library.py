"""The library of the page: concept files with thumbnails, which can be found, renamed and thrown away."""

from __future__ import annotations

import base64
import binascii
import colorsys
import filecmp
import io
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.library_index import ConceptInfo
from atomdiff.concepts.model_card import summarize_file
from atomdiff.concepts.push import push_to_hub
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import check_concept_name, normalize_name
from atomdiff.utils.untrusted import read_safetensors_header

PREVIEW_SUFFIX = ".preview.png"
"""Ending of the image beside a concept file, as other programs name it, too."""
TRASH_FOLDER = ".trash"
"""Where files go that are deleted; hidden, so that a library passes it over."""

_ENDINGS = (".atoms", ".safetensors")  # of files: a name that ends so would make another kind of file of it
_SIDE = 256  # pixels of a thumbnail
_MAX_THUMBNAIL = 1 << 21  # characters of a data URL
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


def search(library: ConceptLibrary, text: str) -> list[ConceptInfo]:
    """Return the concepts whose name, trigger phrase or base have all words of a text in them; the newest first."""
    library.refresh()
    words = text.casefold().split()
    found = [info for info in library.infos() if all(word in _searched(info) for word in words)]
    return sorted(found, key=lambda info: info.mtime_ns, reverse=True)


def _searched(info: ConceptInfo) -> str:
    return " ".join([info.name, info.trigger_phrase, *info.trigger_words, info.base_model]).casefold()


def thumbnail(info: ConceptInfo) -> Image.Image:
    """Return a square image of a concept: that beside its file, that in it, or its first letter."""
    for read in (_read_beside, _read_inside):
        try:
            if (image := read(info)) is not None:
                image.thumbnail((_SIDE, _SIDE))
                return image.convert("RGB")
        except _BROKEN:  # it is decoration only
            continue
    return _letter(info.name)


def _read_beside(info: ConceptInfo) -> Image.Image | None:
    file = _preview(info.path)
    return Image.open(file) if file.is_file() else None


def _read_inside(info: ConceptInfo) -> Image.Image | None:
    header, _, data = read_safetensors_header(info.path)[0].get("modelspec.thumbnail", "").partition(",")
    if not header.startswith("data:image/") or not data or len(data) > _MAX_THUMBNAIL:
        return None
    try:
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    except binascii.Error:
        return None


def _letter(name: str) -> Image.Image:
    """Draw the first letter of a name on a color of its own."""
    hue = zlib.crc32(name.encode()) % 360 / 360
    color = tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, 0.42, 0.35))
    image = Image.new("RGB", (_SIDE, _SIDE), color)
    font = ImageFont.load_default(size=_SIDE * 0.45)
    letter = name.rpartition("/")[2][:1].upper()
    ImageDraw.Draw(image).text((_SIDE / 2, _SIDE / 2), letter, (255, 255, 255), font, anchor="mm")
    return image


def describe(info: ConceptInfo) -> dict[str, Any]:
    """Return what a concept is, by the words of a table.

    Raises:
        UserError: its file cannot be read.
    """
    rows: dict[str, Any] = {
        "trigger phrase": info.trigger_phrase or "none",
        "base": info.base_model or "unknown",
        "size": f"{info.size / 1000:,.1f} KB",
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(info.mtime_ns / 1e9)),
        "file": str(info.path),
    }
    if info.is_lora:
        return {**rows, "method": "LoRA of another program"}
    return {**rows, **{name: value for name, value in summarize_file(info.path).rows.items() if name != "bytes"}}


def add(library: ConceptLibrary, file: Path, preview: Path | None) -> str:
    """Copy a concept file into the library, with an image beside it; one that is there already is not copied again.

    Returns:
        The name: that of the file, with a number if another concept has it.
    """
    stem = name = file.name.removesuffix(CONCEPT_SUFFIX)
    number = 1
    library.refresh()
    while (target := _file(library, name)).exists() or name in library:  # a LoRA file may have the name, too
        if target.exists() and filecmp.cmp(file, target, shallow=False):
            return name
        number += 1
        name = f"{stem}-{number}"
    if preview is not None:
        shutil.copyfile(preview, _preview(target))
    unfinished = target.with_name(f".{target.name}")
    shutil.copyfile(file, unfinished)
    unfinished.rename(target)
    library.refresh()
    return name


def holds(library: ConceptLibrary, name: str, file: Path) -> bool:
    """Tell whether the concept of a name is a copy of a file."""
    return name in library and filecmp.cmp(library.info(name).path, file, shallow=False)


def rename(library: ConceptLibrary, name: str, new_name: str) -> str:
    """Give a concept another name in its folder; its image goes with it. Trigger words stay.

    Returns:
        The name.

    Raises:
        UserError: there is no such concept, the name is taken, or cannot be one.
    """
    info = library.info(name)
    new_name = normalize_name(new_name.strip())
    check_concept_name(new_name)
    if new_name.lower().endswith(_ENDINGS):
        raise UserError(f"found the new name {new_name!r}; expected it without {' or '.join(_ENDINGS)} at its end")
    ending = ".safetensors" if info.is_lora else CONCEPT_SUFFIX
    target = info.path.with_name(new_name + ending)
    folder, slash, _ = info.name.rpartition("/")
    if f"{folder}{slash}{new_name}" in library or target.exists():
        raise UserError(f"there is a concept {new_name!r} already; choose another name")
    if _preview(info.path).exists() and _preview(target).exists():
        raise UserError(f"there is an image {_preview(target).name} already; choose another name, or remove it")
    _move({info.path: target, _preview(info.path): _preview(target)})
    library.refresh()
    return f"{folder}{slash}{new_name}"


def delete(library: ConceptLibrary, name: str) -> Path:
    """Move a concept with its image to the trash folder of the library, and return where it is.

    Raises:
        UserError: there is no such concept.
    """
    path = library.info(name).path
    folder = library.folder / TRASH_FOLDER / time.strftime("%Y-%m-%d_%H%M%S")
    number = 1
    while (folder / path.name).exists():
        number += 1
        folder = folder.with_name(f"{folder.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    _move({file: folder / file.name for file in (path, _preview(path))})
    library.refresh()
    return folder / path.name


def push(library: ConceptLibrary, name: str, repo_id: str, *, token: str, license: str, private: bool) -> str:
    """Push a concept to the Hub, with the image beside its file.

    Args:
        library: where it is.
        name: of the concept.
        repo_id: "user/repo", or "repo" for one of your own; empty: the concept's name.
        token: access token, which is kept nowhere; empty: the one logged in with.
        license: the Hub's name of a license; empty: none.
        private: create a new repository as private.

    Returns:
        The address of the repository.

    Raises:
        UserError: as `push_to_hub`, or there is no such concept.
    """
    info = library.info(name)
    preview = _preview(info.path)
    return push_to_hub(
        info.path,
        repo_id.strip() or name.rpartition("/")[2],
        token=token.strip() or None,
        license=license.strip() or None,
        private=private,
        images={preview: ""} if preview.is_file() else {},
    )


def _move(places: Mapping[Path, Path]) -> None:
    for file, target in places.items():
        if file.exists():
            file.rename(target)


def _file(library: ConceptLibrary, name: str) -> Path:
    return library.folder / f"{name}{CONCEPT_SUFFIX}"


def _preview(file: Path) -> Path:
    name = file.name.removesuffix(CONCEPT_SUFFIX).removesuffix(".safetensors")
    return file.with_name(name + PREVIEW_SUFFIX)
