"""The files of a sampling job: PNGs that know how they were made, their grid and their manifest."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from atomdiff.data.image_files import list_images
from atomdiff.utils.atomic import new_file, write_png
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import wait_for_folder
from atomdiff.utils.image_grid import SHEET_PIXELS, make_image_grid


@dataclass(frozen=True)
class PictureFile:
    """One PNG of a job; its file name depends on prompt and seed alone."""

    folder: Path
    """Where it belongs."""
    prompt: str
    """What it shows."""
    seed: int
    """Where its noise comes from."""
    settings: dict[str, str]
    """What else it depends on."""

    @property
    def path(self) -> Path:
        """Where the picture is, or will be."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60]
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:6]
        return self.folder / f"{slug}-{digest}-seed{self.seed}.png"

    @property
    def facts(self) -> dict[str, str]:
        """The text in the PNG."""
        return {"prompt": self.prompt, "seed": str(self.seed), **self.settings}

    def is_saved(self) -> bool:
        """Tell whether the picture is there, whole, not black all over, and made with these very settings."""
        try:
            with Image.open(self.path) as image:
                image.load()
                return self.is_told_by(image) and image.getbbox() is not None
        except (OSError, SyntaxError):  # what Pillow raises for damaged files
            return False

    def is_told_by(self, image: Image.Image) -> bool:
        """Tell whether the text in an open PNG is that of this picture."""
        return all(image.info.get(key) == value for key, value in self.facts.items())

    def save(self, image: Image.Image) -> None:
        """Write the picture; it gets its name once it is whole."""
        text = PngImagePlugin.PngInfo()
        for key, value in {**self.facts, "size": _size(image)}.items():
            text.add_text(key, value)
        write_png(self.path, image, pnginfo=text)


def write_overview(folder: Path, pictures: Sequence[PictureFile]) -> None:
    """Write grid.png, prompts down and seeds across, and manifest.json, where settings that all share stand once.

    Args:
        folder: where the pictures are.
        pictures: of one job, saved: for each prompt one from each seed.

    Raises:
        UserError: another job has replaced a picture.
    """
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    seeds = list(dict.fromkeys(picture.seed for picture in pictures))
    side = max(32, math.isqrt(SHEET_PIXELS // len(pictures)))
    sizes, thumbnails = zip(*[_thumbnail(picture, side) for picture in pictures], strict=True)
    small = iter(thumbnails)
    sheet = make_image_grid(
        [[next(small) for _ in seeds] for _ in prompts], prompts, [f"seed {seed}" for seed in seeds]
    )
    shared = dict(set.intersection(*[set(picture.settings.items()) for picture in pictures]))
    manifest = {
        "settings": {key: value for key, value in pictures[0].settings.items() if key in shared},
        "images": [
            {"file": picture.path.name, "prompt": picture.prompt, "seed": picture.seed, "size": size}
            | {key: value for key, value in picture.settings.items() if key not in shared}
            for picture, size in zip(pictures, sizes, strict=True)
        ],
    }
    written = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    with wait_for_folder(folder), new_file(folder / "grid.png") as image, new_file(folder / "manifest.json") as text:
        sheet.save(image, format="png")
        text.write_text(written, encoding="utf-8")


def _thumbnail(picture: PictureFile, side: int) -> tuple[str, Image.Image]:
    """Return the size of an image, as text, and a small copy."""
    with Image.open(picture.path) as image:
        if not picture.is_told_by(image):
            raise UserError(f"{picture.path}: another job replaced it; name another --output_dir for one of them")
        size = _size(image)
        image.thumbnail((side, side))
        return size, image.convert("RGB")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


_SHEETS = {"grid.png", "contact_sheet.png", "before_after.png", "training_curve.png"}  # that atomdiff writes


_SAMPLE = re.compile(r"-[0-9a-f]{6}-seed\d+\.png$")


def refuse_foreign_images(folder: Path) -> None:
    """Refuse a folder for samples that holds images which nobody sampled, such as photos to be trained on.

    Raises:
        UserError: It does; the message names some.
    """
    files = list_images(folder) if folder.is_dir() else []
    if foreign := [file.name for file in files if file.name not in _SHEETS and not _SAMPLE.search(file.name)]:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"output_dir={str(folder)!r}: holds images that were not sampled ({shown}); name another folder"
        )
