"""The batches of a run: images augmented and preprocessed, in an order that follows from the seed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from atomdiff.classify.splits import LabeledFiles
from atomdiff.data.images import read_image
from atomdiff.data.sampler import sample_order
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed


@dataclass(frozen=True)
class Augmentation:
    """How training images vary."""

    flip: bool
    """Mirror half of them."""
    least_area: float
    """Smallest share of the area that is cut out."""

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Cut a rectangle of the image's own shape at a random place, of evenly distributed area; perhaps mirror it."""
        mirror, area, left, top = torch.rand(4, generator=generator).tolist()
        scale = math.sqrt(self.least_area + (1 - self.least_area) * area)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in image.size)
            x, y = round(left * (image.width - width)), round(top * (image.height - height))
            image = image.crop((x, y, x + width, y + height))
        return ImageOps.mirror(image) if self.flip and mirror < 0.5 else image


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Reads an image (3, h, w) and its class by (number of the image, position in the training stream).

    Seed and position choose how it is augmented; without an augmentation every image is taken as it is.
    """

    def __init__(
        self, images: LabeledFiles, processor: Any, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.images, self.processor, self.augmentation, self.seed = images, processor, augmentation, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        number, position = key
        image = read_image(self.images.files[number])
        if self.augmentation:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augmentation", position))
            image = self.augmentation(image, generator)
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels, self.images.labels[number]


def _stack(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    shapes = sorted({tuple(pixels.shape) for pixels, _ in samples})
    if len(shapes) > 1:
        expected = "one size; use a base whose preprocessor_config.json resizes to a square or crops, or resize them"
        raise UserError(f"images come out of the preprocessing as {shapes[0]} and {shapes[-1]}; expected {expected}")
    stacked: list[Tensor] = default_collate(samples)
    return stacked


def training_batches(
    images: ImageDataset, batch_size: int, steps: int, process: tuple[int, int] = (0, 1), num_workers: int = 0
) -> "DataLoader[tuple[Tensor, int]]":
    """Load `steps` batches of pixels (batch, 3, h, w) and classes (batch,), every image once an epoch.

    The order follows from the seed of the images, whatever the number of workers is. A process, given by its number and
    the number of processes, gets batches of its own.
    """
    rank, processes = process

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in range(steps):
            position = (step * processes + rank) * batch_size
            order = sample_order(len(images), position, batch_size, derive_seed(images.seed, "order"))
            yield [(image, position + offset) for offset, image in enumerate(order)]

    return DataLoader(images, batch_sampler=keys(), num_workers=num_workers, collate_fn=_stack)  # type: ignore[arg-type]


def evaluation_batches(
    images: ImageDataset, batch_size: int, process: tuple[int, int] = (0, 1), num_workers: int = 0
) -> "DataLoader[tuple[Tensor, int]]":
    """Load this process's share of the images, each once, in batches as `training_batches` does."""
    rank, processes = process
    keys = [(number, 0) for number in range(rank, len(images), processes)]
    return DataLoader(images, batch_size, sampler=keys, num_workers=num_workers, collate_fn=_stack)  # type: ignore[arg-type]
