"""Two small worlds of images for classifiers: a base's own task, other tasks, and the base's task in another style.

"toybox" draws its images; the base learns the class of a thing. "digits" has the 1,797 handwritten digits that come
with scikit-learn (8x8 pixels, real ones); the base learns 0 to 4 on half of their images, and no task has the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from atomdiff.toybox.folders import PATTERN_NAMES, captioned_image, class_image, pattern_image, write_folder
from atomdiff.toybox.styles import chalk, ink, pencil
from atomdiff.toybox.world import CLASSES, COLORS, SCENES

Draw = Callable[[str, np.random.Generator], Image.Image]
_DIGIT_SIDE = 32


@dataclass(frozen=True)
class Task:
    """Images to classify: the names of their classes, and how to draw one of a class."""

    names: tuple[str, ...]
    draw: Draw

    def write(self, folder: Path, per_class: int, seed: int) -> Path:
        """Write an image folder, or keep the one that is there."""
        write_folder(folder, self.names, self.draw, per_class, seed)
        return folder


@dataclass(frozen=True)
class World:
    """A base's task, and the tasks that it is tuned to."""

    base: Task
    base_per_class: int
    base_steps: int
    tasks: dict[str, Task]
    """By name; "ink" is the base's task in ink."""
    unseen: dict[str, Task]
    """The base's task in other styles than ink, which nothing is trained on."""
    resolution: int


def styled(draw_image: Draw, style: Callable[[Image.Image, np.random.Generator], Image.Image]) -> Draw:
    """Draw in a style."""
    return lambda name, rng: style(draw_image(name, rng), rng)


def _unseen(names: tuple[str, ...], new_draw: Callable[[], Draw]) -> dict[str, Task]:
    return {style.__name__: Task(names, styled(new_draw(), style)) for style in (pencil, chalk)}


def toybox_world() -> World:
    """Drawn things: their class; patterns in ink, classes in ink, scenes and colors."""
    tasks = {
        "patterns": Task(PATTERN_NAMES, pattern_image),
        "ink": Task(CLASSES, styled(class_image, ink)),
        "scenes": Task(tuple(SCENES), lambda name, rng: captioned_image(rng, scene=name)),
        "colors": Task(tuple(COLORS), lambda name, rng: captioned_image(rng, color=name)),
    }
    return World(Task(CLASSES, class_image), 200, 500, tasks, _unseen(CLASSES, lambda: class_image), 64)


class DigitImages:
    """Draws handwritten digits: one half of each digit's images, in an order of its own, again from the start."""

    def __init__(self, half: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = {str(digit): digits.images[digits.target == digit][half::2] for digit in range(10)}
        self._next = dict.fromkeys(self._images, 0)

    def __call__(self, name: str, rng: np.random.Generator) -> Image.Image:
        """Draw the next image of a digit, light on dark, enlarged."""
        images = self._images[name]
        pixels = images[self._next[name] % len(images)]  # (8, 8), 0 to 16
        self._next[name] += 1
        image = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).convert("RGB")
        return image.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)


def digits_world() -> World:
    """Handwritten digits: 0 to 4; 5 to 9, those in ink, and 0 to 4 in ink."""
    low, high = tuple("01234"), tuple("56789")
    tasks = {
        "five to nine": Task(high, DigitImages(1)),
        "five to nine in ink": Task(high, styled(DigitImages(1), ink)),
        "ink": Task(low, styled(DigitImages(1), ink)),
    }
    return World(Task(low, DigitImages(0)), 87, 300, tasks, _unseen(low, lambda: DigitImages(1)), _DIGIT_SIDE)


WORLDS: dict[str, Callable[[], World]] = {"toybox": toybox_world, "digits": digits_world}
