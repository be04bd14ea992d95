"""Read the images of a folder as RGB, with their captions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from atomdiff.data.captions import read_captions
from atomdiff.data.image_files import list_images, open_upright
from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a folder: its file name, its pixels in RGB, upright, and its caption."""

    name: str
    rgb: Image.Image
    caption: str | None
    alpha: Image.Image | None = None
    """Its alpha channel in mode L, if it has one that is not opaque all over."""


def read_images(folder: str | Path, minimum_side: int, limit: int | None = None) -> list[CaptionedImage]:
    """Read the images of `folder` (not of its subfolders) in the order of their names.

    Every mode that Pillow reads becomes RGB: 16-bit and float images are scaled to 8 bits, transparent ones are laid
    on white. EXIF orientation is applied. Captions are those that `read_captions` finds.

    Args:
        folder: the folder.
        minimum_side: pixels that the shorter side must have.
        limit: read only the first so many images.

    Raises:
        UserError: no such folder, no image in it, captions that cannot be used, or a message that names the
            unreadable and the tiny files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of images")
    files = list_images(folder)
    if not files:
        inside = [each.name for each in sorted(folder.iterdir()) if each.is_dir() and list_images(each)]
        found = f"; found some in its folder {inside[0]}: name that" if inside else ""
        raise UserError(f"{folder}: no image in it; expected files such as 01.jpg or 01.png{found}")
    captions = read_captions(folder, files)
    images, unreadable, tiny = [], [], []
    for file in files[:limit]:
        try:
            opened = open_upright(file)
        except UserError as error:
            unreadable.append(f"{file.name} ({error})")
            continue
        image = to_rgb(opened)
        if min(image.size) < minimum_side:
            tiny.append(f"{file.name} ({image.width}x{image.height})")
        images.append(CaptionedImage(file.name, image, captions.get(file.name), _alpha(opened)))
    if unreadable or tiny:
        complaints = [f"cannot be read: {', '.join(unreadable)}"] if unreadable else []
        complaints += [f"shorter side under {minimum_side} pixels: {', '.join(tiny)}"] if tiny else []
        raise UserError(f"{folder}: {'; '.join(complaints)}. Replace or remove them")
    return images


def read_image(file: Path) -> Image.Image:
    """Read an image of any mode as upright RGB; warnings and errors are those of `open_upright`."""
    return to_rgb(open_upright(file))


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any mode to RGB: wide integers and floats scaled to 8 bits, transparency laid on a background."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # None only when done in place
        return converted
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of an image of any mode, in mode L, unless it has none or is opaque all over."""
    if image.mode == "F" or image.mode.startswith("I") or not image.has_transparency_data:
        return None
    alpha = (image.convert("LA") if image.mode == "La" else image).convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float values to 8 bits, by the smallest of the usual ranges that holds them."""
    values = np.asarray(image).astype(np.float64)
    brightest = values.max(where=np.isfinite(values), initial=0)
    values = np.nan_to_num(values, posinf=brightest).clip(min=0)
    full_scale = 65535 if image.mode.startswith("I;16") else 255
    if image.mode == "F" and values.max() <= 1:
        full_scale = 1
    while values.max() > full_scale:
        full_scale = (full_scale + 1) ** 2 - 1
    return Image.fromarray((values / full_scale * 255).round().astype(np.uint8))
