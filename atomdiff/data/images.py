"""Photos and captions from folders, and which of them a training step sees."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

from atomdiff.data.captions import read_captions
from atomdiff.data.image_files import picture_files, upright
from atomdiff.utils.atomic import remove_leftovers, write_json, write_png, writing
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import wait_for_folder
from atomdiff.utils.progress import ProgressBar

Picture = Image.Image

CLASS_RECORD = "class_images.json"
"""What the class images beside it were generated with."""
_GENERATED = re.compile(r"class-\d{5}\.png")


@dataclass(frozen=True)
class Photo:
    """One picture of a folder: its file name, its pixels in RGB, upright, and its caption."""

    name: str
    picture: Picture
    caption: str | None
    alpha: Picture | None = None
    """Its alpha channel in mode L, if it has one that is not opaque all over."""


def read_photos(folder: str | Path, minimum_side: int, limit: int | None = None) -> list[Photo]:
    """Read the pictures of `folder` (not of its subfolders) in the order of their names.

    Every mode that Pillow reads becomes RGB: 16-bit and float pictures are scaled to 8 bits, transparent ones are laid
    on white. EXIF orientation is applied. Captions are those that `read_captions` finds.

    Args:
        folder: The folder.
        minimum_side: Pixels that the shorter side must have.
        limit: Read only the first so many pictures.

    Raises:
        UserError: No such folder, no picture in it, captions that cannot be used, or a message that names the
            unreadable and the tiny files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of pictures")
    files = picture_files(folder)
    if not files:
        inside = [each.name for each in sorted(folder.iterdir()) if each.is_dir() and picture_files(each)]
        found = f"; found some in its folder {inside[0]}: name that" if inside else ""
        raise UserError(f"{folder}: no picture in it; expected files such as photo.jpg or photo.png{found}")
    captions = read_captions(folder, files)
    photos, unreadable, tiny = [], [], []
    for file in files[:limit]:
        try:
            whole = upright(file)
        except UserError as error:
            unreadable.append(f"{file.name} ({error})")
            continue
        picture = to_rgb(whole)
        if min(picture.size) < minimum_side:
            tiny.append(f"{file.name} ({picture.width}x{picture.height})")
        photos.append(Photo(file.name, picture, captions.get(file.name), _alpha(whole)))
    if unreadable or tiny:
        complaints = [f"cannot be read: {', '.join(unreadable)}"] if unreadable else []
        complaints += [f"shorter side under {minimum_side} pixels: {', '.join(tiny)}"] if tiny else []
        raise UserError(f"{folder}: {'; '.join(complaints)}. Replace or remove them")
    return photos


def read_picture(file: Path) -> Picture:
    """Read one image of any mode as upright RGB; as `atomdiff.data.image_files.upright`."""
    return to_rgb(upright(file))


def to_rgb(picture: Picture, background: str = "white") -> Picture:
    """Convert any mode to RGB: wide integers and floats scaled to 8 bits, transparency laid on a background."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _scaled(picture).convert("RGB")
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
        assert converted is not None  # None only when done in place
        return converted
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def _alpha(picture: Picture) -> Picture | None:
    """Return the alpha channel of a picture of any mode, in mode L, unless it has none or is opaque all over."""
    if picture.mode == "F" or picture.mode.startswith("I") or not picture.has_transparency_data:
        return None
    alpha = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _scaled(picture: Picture) -> Picture:
    """Scale 16-bit, 32-bit or float values to 8 bits, by the smallest of the usual ranges that holds them."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64)).clip(min=0)
    full_scale = 65535 if picture.mode.startswith("I;16") else 255
    if picture.mode == "F" and values.max() <= 1:
        full_scale = 1
    while values.max() > full_scale:
        full_scale = (full_scale + 1) ** 2 - 1
    return Image.fromarray((values / full_scale * 255).round().astype(np.uint8))


def ensure_class_pictures(
    folder: Path,
    count: int,
    batch_size: int,
    recipe: dict[str, object],
    generate: Callable[[list[int]], list[Picture]],
    share: tuple[int, int] = (0, 1),
) -> None:
    """Fill `folder` up to `count` pictures, unless they are there already.

    Pictures that somebody else put there count; if they are enough, nothing is made or written. Those made here are
    named by their seed and always made in the same batches, so that a stopped call goes on to the same files. What they
    were made with stands beside them, in class_images.json; who knows better may remove that file.

    Args:
        folder: The cache; made if missing.
        count: Pictures wanted.
        batch_size: Pictures generated together.
        recipe: What the pictures depend on (prompt, base model, ...), as JSON.
        generate: Makes one picture for each seed it is given.
        share: This process's number and the number of processes; each makes its share of the batches.

    Raises:
        UserError: The folder holds pictures made from another recipe.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = picture_files(folder)
    foreign = sum(not is_generated(file) for file in files)
    if foreign == len(files) >= count:
        return
    record = folder / CLASS_RECORD
    rank, processes = share
    remove_leftovers(folder)
    with wait_for_folder(folder):  # or two runs with different settings could begin together
        found = _read_record(record)
        if found is None and rank == 0:
            write_json(record, recipe, indent=2)
    found = found or recipe
    if found != recipe:
        differing = [key for key in {**found, **recipe} if found.get(key) != recipe.get(key)]
        then, now = ([repr(each[key]) if key in each else "not noted" for key in differing] for each in (found, recipe))
        changes = "; ".join(f"{key} {old}, now {new}" for key, old, new in zip(differing, then, now, strict=True))
        raise UserError(
            f"{folder}: its class pictures were made with other settings ({changes}). Name another --class_data_dir, "
            f"remove this one, or remove {record.name} in it if you know that its pictures are right"
        )
    seeds = range(max(0, count - foreign))
    batches = [seeds[first : first + batch_size] for first in range(0, len(seeds), batch_size)]
    named = [{folder / f"class-{seed:05d}.png": seed for seed in batch} for batch in batches[rank::processes]]
    missing = [batch for batch in named if not all(file.is_file() for file in batch)]
    for batch in ProgressBar(missing, "generating class images", unit="batches", disable=not missing or rank > 0):
        if all(file.is_file() for file in batch):
            continue  # another run, in the same folder, has been faster
        for file, picture in zip(batch, generate(list(batch.values())), strict=True):
            write_png(file, picture)


def is_generated(file: Path) -> bool:
    """Tell by its name whether a class image was generated by `ensure_class_pictures`."""
    return _GENERATED.fullmatch(file.name) is not None


def _read_record(file: Path) -> dict[str, object] | None:
    """Return what class images were generated with; None where it is not noted, with a warning if it is damaged."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        warnings.warn(f"{file}: damaged; the class images beside it are taken for those of this run", stacklevel=3)
        return None
    return found


def sample_order(count: int, position: int, batch_size: int, seed: int) -> list[int]:
    """Return which of `count` samples stand at `position`, `position + 1`, ... of an endless shuffled reading.

    Every `count` positions hold each sample once. A pure function of its arguments, so that nothing has to be saved to
    go on where a run stopped.
    """
    order: list[int] = []
    for epoch in range(position // count, (position + batch_size - 1) // count + 1):
        shuffle = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        order += torch.randperm(count, generator=shuffle).tolist()
    first = position % count
    return order[first : first + batch_size]


def bucket_turn(number: int, counts: Sequence[int], seed: int) -> tuple[int, int]:
    """Return which bucket forward pass `number` belongs to, and how many earlier passes did.

    Every round of `sum(counts)` passes has `counts[b]` of bucket `b`, in an order of its own: if those are the samples
    of the buckets, every sample comes equally often in a round. A pure function, as `sample_order` is.
    """
    length = sum(counts)
    earlier_rounds, place = divmod(number, length)
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    order = [buckets[i] for i in sample_order(length, earlier_rounds * length, length, seed)]
    bucket = order[place]
    return bucket, earlier_rounds * counts[bucket] + order[:place].count(bucket)


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a seed (63 bits) for one use of randomness, from the run's seed and what the use is called."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
