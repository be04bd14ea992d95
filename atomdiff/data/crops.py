"""Cut images to the sizes that are trained on."""

from dataclasses import dataclass

from PIL import Image, ImageOps

from atomdiff.data.buckets import Size


@dataclass(frozen=True)
class Crop:
    """A crop of an image, in a size that is trained on."""

    image: Image.Image
    """RGB."""
    mask: Image.Image | None
    """The same crop of the image's mask, in mode L."""
    time_ids: tuple[int, int, int, int, int, int]
    """SDXL's micro-conditioning, in pixels: original height and width, top and left of the crop in the resized image,
    target height and width. Podell et al., arXiv 2307.01952, section 2.2."""


def make_crops(
    image: Image.Image, size: Size, center_crop: bool, random_flip: bool = False, mask: Image.Image | None = None
) -> list[Crop]:
    """Cut crops of `size` (height, width) from an image that is first resized to just cover it.

    Args:
        image: an RGB image.
        size: of the crops, in pixels.
        center_crop: only the middle; else also both ends of the side that is too long, if they differ.
        random_flip: add the mirror images.
        mask: in mode L, as large as the image.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized_size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(resized_size, Image.Resampling.LANCZOS)
    resized_mask = mask and mask.resize(resized_size, Image.Resampling.BOX)
    cut, mirrored = [], []
    free_x, free_y = resized_size[0] - width, resized_size[1] - height
    for x in _offsets(free_x, center_crop):
        for y in _offsets(free_y, center_crop):
            box = (x, y, x + width, y + height)
            crop, crop_mask = resized.crop(box), resized_mask and resized_mask.crop(box)
            cut.append(Crop(crop, crop_mask, (image.height, image.width, y, x, height, width)))
            ids = (image.height, image.width, y, free_x - x, height, width)
            mirrored.append(Crop(ImageOps.mirror(crop), crop_mask and ImageOps.mirror(crop_mask), ids))
    return cut + mirrored if random_flip else cut


def _offsets(free: int, center: bool) -> list[int]:
    return [free // 2] if center else sorted({0, free // 2, free})
