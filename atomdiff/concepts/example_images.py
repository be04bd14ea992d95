"""Example images of a concept for its repository on the Hub: which ones to take, and their prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from atomdiff.concepts.hub import PathLike
from atomdiff.data.image_files import open_upright
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file

ExampleImages = PathLike | Sequence[PathLike] | Mapping[Any, str]  # the last from file to prompt

_MAX_FOUND = 8  # images taken without being named
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


def find_examples(images: ExampleImages | None, concept: Path) -> list[tuple[Path, str]]:
    """Return image files with their prompts; the prompt of an image grid is empty.

    Args:
        images: files and folders of `atomdiff sample`, or a mapping from file to prompt; None: the concept's folder.
        concept: the concept's file or folder.
    """
    if isinstance(images, Mapping):
        return [(Path(file), prompt) for file, prompt in images.items()]
    if images is None:
        return _generated_with(concept, concept.parent)
    files = [Path(file) for file in ([images] if isinstance(images, (str, os.PathLike)) else images)]
    return [
        example
        for file in files
        for example in (_generated_with(concept, file) if file.is_dir() else [(file, _read_text(file, "prompt"))])
    ]


def open_without_metadata(file: Path) -> Image.Image:
    """Open an image upright in RGB, without its metadata.

    Raises:
        UserError: it cannot be read.
    """
    try:
        image = open_upright(file).convert("RGB")
    except UserError as error:
        raise UserError(f"cannot read the image {file}: {error}") from error
    return Image.frombytes("RGB", image.size, image.tobytes())


def _generated_with(concept: Path, folder: Path) -> list[tuple[Path, str]]:
    """Return the images in a folder whose metadata name this concept, and the grids of such images alone."""
    digest = hash_file(concept)
    images = [file for file in sorted(folder.glob("*.png")) if digest in _read_text(file, "concepts")]
    grids = ["grid.png", "contact_sheet.png"] if _is_grid_of(digest, folder) else ["contact_sheet.png"]
    examples = [(file, _read_text(file, "prompt")) for file in images[:_MAX_FOUND]]
    return examples + [(folder / name, "") for name in grids if (folder / name).is_file()]


def _is_grid_of(digest: str, folder: Path) -> bool:
    """Tell whether all images of a folder's manifest were generated with the concept of this hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        concepts = [{**manifest["settings"], **image}["concepts"] for image in manifest["images"]]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(concepts) and all(digest in each for each in concepts)


def _read_text(file: Path, key: str) -> str:
    """Return a text that `atomdiff sample` wrote into a PNG; empty where there is none."""
    try:
        with Image.open(file) as image:
            return str(image.info.get(key, "")) if "concepts" in image.info else ""
    except _BROKEN:  # an error only where the image is opened to be used
        return ""
