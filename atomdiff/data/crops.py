"""The pieces of a picture that a network sees."""

from dataclasses import dataclass

from PIL import Image, ImageOps

from atomdiff.data.buckets import Size
from atomdiff.data.images import Picture


@dataclass(frozen=True)
class View:
    """A piece of a picture, of the size that is trained on."""

    picture: Picture
    """RGB."""
    mask: Picture | None
    """The same piece of the picture's mask, in mode L."""
    time_ids: tuple[int, int, int, int, int, int]
    """What SDXL is told of it, in pixels: height and width of the whole picture before it was resized, top and left of
    the piece in the resized one, height and width of the piece. Podell et al., arXiv 2307.01952, section 2.2."""


def views(
    picture: Picture, size: Size, center_crop: bool, random_flip: bool = False, mask: Picture | None = None
) -> list[View]:
    """Cut pieces of `size` (height, width) from a picture that is first resized to just cover it.

    Args:
        picture: An RGB picture.
        size: Of the pieces, in pixels.
        center_crop: Only the middle; else also both ends of the side that is too long, if they differ.
        random_flip: Mirror images too.
        mask: In mode L, as large as the picture.
    """
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    whole = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    resized = picture.resize(whole, Image.Resampling.LANCZOS)
    resized_mask = mask and mask.resize(whole, Image.Resampling.BOX)
    cut, mirrored = [], []
    spare_x, spare_y = whole[0] - width, whole[1] - height
    for x in _offsets(spare_x, center_crop):
        for y in _offsets(spare_y, center_crop):
            box = (x, y, x + width, y + height)
            piece, of_mask = resized.crop(box), resized_mask and resized_mask.crop(box)
            cut.append(View(piece, of_mask, (picture.height, picture.width, y, x, height, width)))
            ids = (picture.height, picture.width, y, spare_x - x, height, width)
            mirrored.append(View(ImageOps.mirror(piece), of_mask and ImageOps.mirror(of_mask), ids))
    return cut + mirrored if random_flip else cut


def _offsets(spare: int, center: bool) -> list[int]:
    return [spare // 2] if center else sorted({0, spare // 2, spare})
