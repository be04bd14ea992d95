"""Masks: which part of a photo the loss is about."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from atomdiff.data.image_files import normal, picture_files, upright
from atomdiff.data.images import Photo, Picture, to_rgb
from atomdiff.utils.errors import UserError

_LIGHT = 128  # what the lightest pixel of a mask must reach: one of 0 and 1 was not meant to be black


def read_masks(folder: str | Path, photos: Sequence[Photo]) -> list[Picture | None]:
    """Return the masks of the photos of a folder, in mode L and as large as the photo; None for those without.

    A mask is a picture named like the photo, with any suffix, in the folder's own folder `mask`, white where the
    subject is; else the photo's alpha channel.

    Raises:
        UserError: A message that names the masks that cannot be used, and why.
    """
    beside = Path(folder) / "mask"
    files: dict[str, Path] = {}
    complaints: dict[str, list[str]] = {}
    stems = {_stem(photo.name) for photo in photos}
    for file in picture_files(beside) if beside.is_dir() else ():
        if _stem(file.name) not in stems:
            complaints.setdefault("no photo of this name", []).append(file.name)
        elif _stem(file.name) in files:
            complaints.setdefault("a second one of this name", []).append(file.name)
        files.setdefault(_stem(file.name), file)
    masks: list[Picture | None] = []
    for photo in photos:
        named = files.get(_stem(photo.name))
        try:
            mask = to_rgb(upright(named), background="black").convert("L") if named else photo.alpha
        except UserError as error:
            complaints.setdefault("cannot be read", []).append(f"{named and named.name} ({error})")
            continue
        if mask is not None:
            name = named.name if named else f"alpha channel of {photo.name}"
            if not _same_shape(mask, photo.picture):
                found = f"{name} ({mask.width}x{mask.height}, its photo {photo.picture.width}x{photo.picture.height})"
                complaints.setdefault("shaped unlike the photo", []).append(found)
            elif np.asarray(mask).max() < _LIGHT:
                complaints.setdefault("nowhere white", []).append(name)
            mask = mask.resize(photo.picture.size, Image.Resampling.BOX)
        masks.append(mask)
    if complaints:
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in complaints.items())
        raise UserError(f"{folder}: masks that cannot be used: {found}. Replace or remove them")
    return masks


def latent_weights(masks: Sequence[Picture | None], size: tuple[int, int], unmasked_weight: float) -> Tensor:
    """Return the loss weights (masks, 1, h, w) of latents of `size` (h, w): the mask's mean over each latent pixel.

    White counts 1, black `unmasked_weight`, and every pixel 1 where there is no mask.
    """
    weights = torch.ones(len(masks), 1, *size)
    for number, mask in enumerate(masks):
        if mask is not None:
            light = torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255  # (1, height, width)
            weights[number] = unmasked_weight + (1 - unmasked_weight) * adaptive_avg_pool2d(light, size)
    return weights


def _stem(name: str) -> str:
    return normal(Path(name).stem)


def _same_shape(mask: Picture, photo: Picture) -> bool:
    """Whether the sides of the two have the same ratio, to the nearest pixel of the mask."""
    return (
        abs(mask.height - mask.width * photo.height / photo.width) <= 1
        or abs(mask.width - mask.height * photo.width / photo.height) <= 1
    )
