"""Image folders: which picture belongs to which class and split, and how it becomes the network's input."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from atomdiff.data.image_files import list_images, normalize_name
from atomdiff.data.images import read_image
from atomdiff.data.sampler import sample_order
from atomdiff.utils.errors import UserError
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.seeds import derive_seed

_SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class LabelledFiles:
    """Picture files and the number of each one's class."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Splits:
    """The pictures of a run."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""
    train: LabelledFiles
    validation: LabelledFiles
    test: LabelledFiles | None


def read_splits(folder: str | Path, validation_share: float, test_share: float, seed: int) -> Splits:
    """Find the pictures in `folder/<class>/`, or in `folder/<split>/<class>/` with train, validation (val) and test.

    Without splits, `validation_share` and `test_share` of each class are drawn from the seed. With them, only a missing
    validation is drawn, from train; a missing test stays missing.

    Raises:
        UserError: The folder does not look like that, has fewer than two classes, an empty class, pictures deeper
            inside one, a class that train lacks, or a class too small to be split; or pictures cannot be read.
    """
    folder = Path(folder)
    found = _split_folders(folder)
    if not found:
        classes = _read_classes(folder)
        held_out = _hold_out(classes, {"test": test_share, "validation": validation_share}, seed)
    else:
        classes = _read_classes(found["train"])
        held_out = {split: _read_classes(found[split], classes) for split in ("validation", "test") if split in found}
        if "validation" not in found:
            held_out |= _hold_out(classes, {"validation": validation_share}, seed)
    drawn = {file for split in held_out.values() for files in split.values() for file in files}
    train = {name: [file for file in files if file not in drawn] for name, files in classes.items()}
    names = tuple(classes)
    splits = {split: _labelled(files, names) for split, files in {"train": train, **held_out}.items()}
    _refuse_unreadable([file for split in splits.values() for file in split.files], folder)
    test = splits.get("test")
    return Splits(names, splits["train"], splits["validation"], test if test and len(test) else None)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split, or none if the sub-folders are classes (one of which may well be called train)."""
    if not folder.is_dir():
        raise UserError(
            f"train_data_dir={str(folder)!r}: no such folder; expected one with a sub-folder for each class"
        )
    if not (folder / "train").is_dir() or not _sub_folders(folder / "train"):
        return {}
    found: dict[str, Path] = {}
    for path in _sub_folders(folder):
        split = _SPLIT_NAMES.get(path.name)
        if split is None or split in found:
            expected = "train, validation (or val) and test, each once"
            raise UserError(f"{path}: not a split of the pictures; beside {folder / 'train'} stand only {expected}")
        found[split] = path
    return found


def _sub_folders(folder: Path) -> list[Path]:
    # __MACOSX and the like are no classes; but a single underscore may well begin the name of one.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _read_classes(folder: Path, known: Mapping[str, object] | None = None) -> dict[str, list[Path]]:
    """List the pictures of every class, in the order of the names; all names must be `known` ones, if given."""
    classes = {normalize_name(path.name): list_images(path) for path in _sub_folders(folder)}
    if known is None and len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise UserError(
            f"{folder}: found {len(classes)} sub-folders ({names}); expected one for each of several classes"
        )
    if deeper := [path for each in _sub_folders(folder) for path in _sub_folders(each) if list_images(path)]:
        expected = "a class's pictures directly in its folder, and splits called train, validation (or val) and test"
        raise UserError(f"{deeper[0]}: pictures too deep inside, they would be passed over; expected {expected}")
    if empty := [name for name, files in classes.items() if not files]:
        raise UserError(f"{folder}: no picture in {', '.join(empty)}; add some, or remove the folder")
    if unknown := [name for name in classes if known is not None and name not in known]:
        raise UserError(f"{folder}: {', '.join(unknown)} not among the classes to train on ({', '.join(known or {})})")
    if not classes:
        raise UserError(
            f"{folder}: no sub-folder in it; expected one for each class, or no folder {folder.name} at all"
        )
    return classes


def _hold_out(
    classes: Mapping[str, list[Path]], shares: Mapping[str, float], seed: int
) -> dict[str, dict[str, list[Path]]]:
    """Draw a share of each class for every split: rounded, but at least one picture unless the share is 0."""
    drawn: dict[str, dict[str, list[Path]]] = {split: {} for split in shares}
    for name, files in classes.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", name))
        order = [files[index] for index in torch.randperm(len(files), generator=generator).tolist()]
        counts = {split: max(1, round(share * len(files))) if share else 0 for split, share in shares.items()}
        if sum(counts.values()) >= len(files):
            parts = ", ".join(f"{count} for {split}" for split, count in counts.items())
            raise UserError(f"{files[0].parent}: {len(files)} pictures, {parts}: none is left to train on; add some")
        for split, count in counts.items():
            drawn[split][name], order = order[:count], order[count:]
    return drawn


def _labelled(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> LabelledFiles:
    pairs = [(file, names.index(name)) for name, files in classes.items() for file in files]
    return LabelledFiles(tuple(file for file, _ in pairs), tuple(label for _, label in pairs))


def _refuse_unreadable(files: Sequence[Path], folder: Path) -> None:
    """Read every picture once, so that a damaged one is told now and not in the middle of the run."""
    unreadable = []
    for file in ProgressBar(files, "checking images", unit="images", disable=len(files) < 2000, leave=False):
        try:
            read_image(file)
        except UserError as error:
            unreadable.append(f"{file.relative_to(folder)} ({error})")
    if unreadable:
        shown = ", ".join(unreadable[:10]) + (f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else "")
        raise UserError(f"{folder}: cannot be read: {shown}. Replace or remove them")


@dataclass(frozen=True)
class Augmentation:
    """How training pictures vary."""

    flip: bool
    """Mirror half of them."""
    least_area: float
    """Smallest share of the area that is cut out."""

    def __call__(self, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        """Cut a rectangle of the picture's own shape at a random place, its area evenly drawn; perhaps mirror it."""
        mirror, area, left, top = torch.rand(4, generator=generator).tolist()
        scale = math.sqrt(self.least_area + (1 - self.least_area) * area)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in picture.size)
            x, y = round(left * (picture.width - width)), round(top * (picture.height - height))
            picture = picture.crop((x, y, x + width, y + height))
        return ImageOps.mirror(picture) if self.flip and mirror < 0.5 else picture


class PictureSet(Dataset[tuple[Tensor, int]]):
    """Reads a picture (3, h, w) and its class by (number of the picture, position in the training stream).

    Args:
        pictures: The pictures.
        processor: The network's image processor.
        augmentation: What a position changes, or None to take every picture as it is.
        seed: Seed of the augmentation.
    """

    def __init__(
        self, pictures: LabelledFiles, processor: Any, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.pictures, self.processor, self.augmentation, self.seed = pictures, processor, augmentation, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        number, position = key
        picture = read_image(self.pictures.files[number])
        if self.augmentation:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augmentation", position))
            picture = self.augmentation(picture, generator)
        pixels: Tensor = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return pixels, self.pictures.labels[number]


def _stack(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    shapes = sorted({tuple(pixels.shape) for pixels, _ in samples})
    if len(shapes) > 1:
        expected = "one size; use a base whose preprocessor_config.json resizes to a square or crops, or resize them"
        raise UserError(f"pictures come out of the preprocessing as {shapes[0]} and {shapes[-1]}; expected {expected}")
    stacked: list[Tensor] = default_collate(samples)
    return stacked


def training_batches(
    pictures: PictureSet, batch_size: int, steps: int, process: tuple[int, int] = (0, 1), num_workers: int = 0
) -> "DataLoader[tuple[Tensor, int]]":
    """Load `steps` batches of pixels (batch, 3, h, w) and classes (batch,), every picture once an epoch.

    Args:
        pictures: The training pictures; the order follows from their seed.
        batch_size: Pictures a batch.
        steps: Batches.
        process: Number of this process and number of processes: each gets batches of its own.
        num_workers: Processes that read; they change no batch.
    """
    rank, processes = process

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in range(steps):
            position = (step * processes + rank) * batch_size
            order = sample_order(len(pictures), position, batch_size, derive_seed(pictures.seed, "order"))
            yield [(number, position + place) for place, number in enumerate(order)]

    return DataLoader(pictures, batch_sampler=keys(), num_workers=num_workers, collate_fn=_stack)  # type: ignore[arg-type]


def evaluation_batches(
    pictures: PictureSet, batch_size: int, process: tuple[int, int] = (0, 1), num_workers: int = 0
) -> "DataLoader[tuple[Tensor, int]]":
    """Load this process's share of the pictures, each once, in batches as `training_batches` does."""
    rank, processes = process
    keys = [(number, 0) for number in range(rank, len(pictures), processes)]
    return DataLoader(pictures, batch_size, sampler=keys, num_workers=num_workers, collate_fn=_stack)  # type: ignore[arg-type]
