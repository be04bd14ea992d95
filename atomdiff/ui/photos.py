"""What to know of photos before a run: which are turned, cropped, enlarged, or cannot be read."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from atomdiff.data.image_files import open_upright
from atomdiff.data.images import to_rgb
from atomdiff.utils.errors import UserError

_SQUARE = 1.05  # long side by short side up to which a photo counts as square
_THUMBNAIL = 256  # pixels


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo that was dropped on the page."""

    file: Path
    """As it was sent."""
    thumbnail: Image.Image | None
    """Upright, in RGB; None: it cannot be read."""
    note: str
    """What training will do with it, if that is worth knowing."""

    @property
    def can_be_used(self) -> bool:
        """Whether it can be trained on."""
        return self.thumbnail is not None


def look_at_photo(file: Path, resolution: int | None) -> Photo:
    """Open a photo as training will, and note what it will do.

    Args:
        file: the photo.
        resolution: side of training images, in pixels; None: unknown.
    """
    notes = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            upright = open_upright(file)
        said = [str(warning.message) for warning in caught]  # in other threads, too
        notes += [text.removeprefix(f"{file}: ") for text in said if text.startswith(f"{file}: ")]
    except UserError as error:
        return Photo(file, None, f"cannot be used: {error}")
    short, long = sorted(upright.size)
    least = (resolution or 2) // 2  # as training has it
    if short < least:
        return Photo(file, None, f"cannot be used: {short} pixels on its shorter side; expected at least {least}")
    if _stored_size(file) == upright.size[::-1] != upright.size:
        notes.append("turned upright, as the camera noted")
    if resolution is not None and short < resolution:
        notes.append(f"small: enlarged to {resolution} pixels")
    if long > _SQUARE * short:
        notes.append(f"not square ({upright.width}x{upright.height}): trained in square crops")
    thumbnail = to_rgb(upright)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Photo(file, thumbnail, "; ".join(notes))


def _stored_size(file: Path) -> tuple[int, int] | None:
    """Return the size before turning; None: Pillow opens the file only without its texts and profiles."""
    try:
        with Image.open(file) as image:
            return image.size
    except Exception:  # Pillow's plugins raise whatever their parsers raise
        return None
