"""The files of a sampling folder: PNGs that carry how they were made, a grid and a manifest of all of them."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from atomdiff.data.image_files import list_images
from atomdiff.utils.atomic import new_file, write_png
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import wait_for_folder
from atomdiff.utils.image_grid import SHEET_PIXELS, make_image_grid

_SAMPLE = re.compile(r"-[0-9a-f]{6}(?:[0-9a-f]{6})?-seed\d+\.png$")
_SLUG_LENGTH = 60
_SHEETS = {"grid.png", "contact_sheet.png", "before_after.png", "training_curve.png"}  # that atomdiff writes
_BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises for damaged files
_NO_SETTING = ("prompt", "seed", "size")  # of the text in a PNG


@dataclass(frozen=True)
class SampleFile:
    """One PNG of a sampling job; its file name depends on prompt and seed alone."""

    folder: Path
    """Its folder."""
    prompt: str
    """Its prompt."""
    seed: int
    """Seed of its noise."""
    settings: dict[str, str]
    """Everything else that it depends on."""

    @property
    def path(self) -> Path:
        """The PNG's path. The digest is longer where it has to tell more prompts apart: those of one beginning."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[: 6 if 0 < len(slug) <= _SLUG_LENGTH else 12]
        return self.folder / f"{slug[:_SLUG_LENGTH]}-{digest}-seed{self.seed}.png"

    @property
    def metadata(self) -> dict[str, str]:
        """The text in the PNG, without the image's size."""
        return {"prompt": self.prompt, "seed": str(self.seed), **self.settings}

    def is_saved(self) -> bool:
        """Tell whether the PNG exists, undamaged, not completely black, and with the same metadata."""
        try:
            with Image.open(self.path) as image:
                image.load()
                return self.matches(image.info) and image.getbbox() is not None
        except _BROKEN:
            return False

    def matches(self, text: Mapping[Any, Any]) -> bool:
        """Tell whether a PNG with this text is the image. What the text lacks had no value."""
        return all(text.get(key, "") == value for key, value in self.metadata.items())

    def read_settings(self) -> dict[str, str]:
        """Return the settings in the text of the saved PNG."""
        with Image.open(self.path) as image:
            return {str(key): value for key, value in image.info.items() if key not in _NO_SETTING}

    def save(self, image: Image.Image) -> None:
        """Write the PNG, whole or not at all."""
        text = PngImagePlugin.PngInfo()
        for key, value in {**self.metadata, "size": f"{image.width}x{image.height}"}.items():
            text.add_text(key, value)
        write_png(self.path, image, pnginfo=text)


def write_overview(folder: Path, samples: Sequence[SampleFile]) -> None:
    """Write grid.png and manifest.json of all samples in a folder, those of earlier jobs, too.

    The grid has a row for each prompt and a column for each seed. Settings that all images share stand once in the
    manifest.

    Args:
        folder: the folder.
        samples: the images of this job, which come first; saved.

    Raises:
        UserError: another job has replaced an image of this one.
    """
    with (
        wait_for_folder(folder),
        new_file(folder / "grid.png") as grid_file,
        new_file(folder / "manifest.json") as manifest,
    ):
        earlier = [file for file in sorted(folder.glob("*.png")) if _SAMPLE.search(file.name)]
        files = dict.fromkeys([*(sample.path for sample in samples), *earlier])
        side = max(32, math.isqrt(SHEET_PIXELS // len(files)))
        found = {file: image for file in files if (image := _read(file, side)) is not None}
        for sample in samples:
            if sample.path not in found or not sample.matches(found[sample.path].text):
                raise UserError(f"{sample.path}: another job replaced it; use another --output_dir for one of them")
        _write_grid(grid_file, list(found.values()))
        manifest.write_text(json.dumps(_manifest(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _SavedImage:
    text: dict[str, str]
    size: str
    thumbnail: Image.Image


def _read(file: Path, side: int) -> _SavedImage | None:
    """Return a PNG's text and a thumbnail; None: it is damaged, or no sample."""
    try:
        with Image.open(file) as image:
            text = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
            size = f"{image.width}x{image.height}"
            image.thumbnail((side, side))
            saved = _SavedImage(text, size, image.convert("RGB"))
    except _BROKEN:
        return None
    return saved if text.keys() >= {"prompt", "seed", "concepts"} else None


def _write_grid(file: Path, images: Sequence[_SavedImage]) -> None:
    by_place = {(image.text["prompt"], image.text["seed"]): image.thumbnail for image in images}
    prompts, seeds = (list(dict.fromkeys(keys)) for keys in zip(*by_place, strict=True))
    rows = [[by_place.get((prompt, seed)) for seed in seeds] for prompt in prompts]
    make_image_grid(rows, prompts, [f"seed {seed}" for seed in seeds]).save(file, format="png")


def _manifest(images: dict[Path, _SavedImage]) -> dict[str, object]:
    settings = [{key: image.text[key] for key in image.text if key not in _NO_SETTING} for image in images.values()]
    shared = dict(set.intersection(*[set(each.items()) for each in settings]))
    return {
        "settings": {key: value for key, value in settings[0].items() if key in shared},
        "images": [
            {"file": file.name, "prompt": image.text["prompt"], "seed": int(image.text["seed"]), "size": image.size}
            | {key: value for key, value in of_image.items() if key not in shared}
            for (file, image), of_image in zip(images.items(), settings, strict=True)
        ],
    }


def refuse_foreign_images(folder: Path) -> None:
    """Refuse an output folder with images that were not sampled, such as training images.

    Raises:
        UserError: it has some; the message names them.
    """
    files = list_images(folder) if folder.is_dir() else []
    if foreign := [file.name for file in files if file.name not in _SHEETS and not _SAMPLE.search(file.name)]:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(f"output_dir={str(folder)!r}: has images that were not sampled ({shown}); use another folder")
