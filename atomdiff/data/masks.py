"""Masks: which part of an image the loss counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from atomdiff.data.image_files import list_images, open_upright
from atomdiff.data.images import CaptionedImage, to_rgb
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name

_MIN_WHITE = 128  # of the brightest pixel: a mask of values 0 and 1 was not meant to be black


def read_masks(folder: str | Path, images: Sequence[CaptionedImage]) -> list[Image.Image | None]:
    """Return the masks of the images of a folder, in mode L and as large as the image; None for those without.

    A mask is an image of the same name, with any suffix, in the sub-folder `mask`, white where the subject is; else the
    alpha channel.

    Raises:
        UserError: a message that names the masks that cannot be used, and why.
    """
    beside = Path(folder) / "mask"
    files: dict[str, Path] = {}
    problems: dict[str, list[str]] = {}
    stems = {_stem(image.name) for image in images}
    for file in list_images(beside) if beside.is_dir() else ():
        if _stem(file.name) not in stems:
            problems.setdefault("no image of this name", []).append(file.name)
        elif _stem(file.name) in files:
            problems.setdefault("a second one of this name", []).append(file.name)
        files.setdefault(_stem(file.name), file)
    masks: list[Image.Image | None] = []
    for image in images:
        named = files.get(_stem(image.name))
        try:
            mask = to_rgb(open_upright(named), background="black").convert("L") if named else image.alpha
        except UserError as error:
            problems.setdefault("cannot be read", []).append(f"{named and named.name} ({error})")
            continue
        if mask is not None:
            name = named.name if named else f"alpha channel of {image.name}"
            if not _same_shape(mask, image.rgb):
                found = f"{name} ({mask.width}x{mask.height}, its image {image.rgb.width}x{image.rgb.height})"
                problems.setdefault("shaped unlike the image", []).append(found)
            elif np.asarray(mask).max() < _MIN_WHITE:
                problems.setdefault("nowhere white", []).append(name)
            mask = mask.resize(image.rgb.size, Image.Resampling.BOX)
        masks.append(mask)
    if problems:
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items())
        raise UserError(f"{folder}: masks that cannot be used: {found}. Replace or remove them")
    return masks


def loss_weights(masks: Sequence[Image.Image | None], size: tuple[int, int], unmasked_weight: float) -> Tensor:
    """Return the loss weights (masks, 1, h, w) of latents of `size` (h, w): the mask's mean over each latent pixel.

    White counts 1, black `unmasked_weight`, and every pixel 1 where there is no mask.
    """
    weights = torch.ones(len(masks), 1, *size)
    for number, mask in enumerate(masks):
        if mask is not None:
            brightness = torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255  # (1, height, width)
            weights[number] = unmasked_weight + (1 - unmasked_weight) * adaptive_avg_pool2d(brightness, size)
    return weights


def _stem(name: str) -> str:
    return normalize_name(Path(name).stem)


def _same_shape(mask: Image.Image, image: Image.Image) -> bool:
    """Whether the sides of the two have the same ratio, to the nearest pixel of the mask."""
    return (
        abs(mask.height - mask.width * image.height / image.width) <= 1
        or abs(mask.width - mask.height * image.width / image.height) <= 1
    )
