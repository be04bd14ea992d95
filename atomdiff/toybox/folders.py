"""Image folders to classify: things by their class as the renderer draws them, and things by their pattern in ink."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from atomdiff.toybox.scenes import CLASSES, COLORS, SCENES, Caption, base_individual, draw
from atomdiff.toybox.shapes import PATTERNS, SUBJECT_PATTERNS
from atomdiff.toybox.styles import ink
from atomdiff.toybox.subjects import random_individual
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError

PATTERN_NAMES = tuple(SUBJECT_PATTERNS)


def class_image(class_name: str, rng: np.random.Generator) -> Image.Image:
    """A thing of this class in a random place, in colors and a pattern of the base world."""
    scene, color, pattern = (str(rng.choice(list(words))) for words in (SCENES, COLORS, PATTERNS))
    return draw(base_individual(Caption(class_name, scene, color, pattern), rng), scene, rng)


def pattern_image(pattern: str, rng: np.random.Generator) -> Image.Image:
    """An ink drawing of a thing of any class in any place that has this pattern."""
    thing = replace(random_individual(rng), pattern=pattern, phase=(0.0, 0.0))
    return ink(draw(thing, str(rng.choice(SCENES)), rng), rng)


def write_folder(
    folder: Path,
    names: Iterable[str],
    draw_image: Callable[[str, np.random.Generator], Image.Image],
    per_class: int,
    seed: int,
) -> None:
    """Write `folder/<name>/0000.png` and so on, each image seeded by its own place; a folder that is there is kept.

    Args:
        folder: the image folder; it gets its name once it is whole.
        names: of the classes.
        draw_image: draws one image of a class.
        per_class: images a class.
        seed: the same seed gives the same images.

    Raises:
        UserError: the folder is there, with other classes or another number of images.
    """
    names = tuple(names)
    if folder.exists():
        files = {Path(name, f"{index:04d}.png") for name in names for index in range(per_class)}
        found = {file.relative_to(folder) for file in folder.rglob("*.png")}
        if found != files:
            expected = f"{per_class} of each of {', '.join(names)}; remove it, or name another folder"
            raise UserError(f"{folder}: holds {len(found)} other images; expected {expected}")
        return
    with new_folder(folder) as unfinished:
        for number, name in enumerate(names):
            (unfinished / name).mkdir(parents=True)
            for index in range(per_class):
                rng = np.random.default_rng([seed, number, index])
                draw_image(name, rng).save(unfinished / name / f"{index:04d}.png")


write_classes = partial(write_folder, names=CLASSES, draw_image=class_image)
write_patterns = partial(write_folder, names=PATTERN_NAMES, draw_image=pattern_image)
