"""The files of a sampling job: PNGs that know how they were made, their grid and their manifest."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from atomdiff.utils.atomic import new_file, write_png
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import in_turn
from atomdiff.utils.image_grid import SHEET_PIXELS, grid


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
    sheet = grid([[next(small) for _ in seeds] for _ in prompts], prompts, [f"seed {seed}" for seed in seeds])
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
    with in_turn(folder), new_file(folder / "grid.png") as image, new_file(folder / "manifest.json") as text:
        sheet.save(image, format="png")
        text.write_text(written, encoding="utf-8")


def content_hash(path: Path) -> str:
    """Return a SHA-256 of a file, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def listing_hash(folder: Path) -> str:
    """Return a SHA-256 of names, sizes and times: the gigabytes of a base are not worth reading twice."""
    stats = [(str(file.relative_to(folder)), file.stat()) for file in _files(folder)]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


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
