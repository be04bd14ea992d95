"""Image folders to classify: things by their class as the world shows them, and things by their pattern in ink."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from atomdiff.toybox.styles import ink
from atomdiff.toybox.world import (
    CLASSES,
    COLORS,
    FAMILY_NAMES,
    PATTERNS,
    SCENES,
    Individuals,
    draw_individuals,
    individuals_of,
    make_captions,
    render,
    sample_views,
    to_images,
)
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError

PATTERN_NAMES = ("bands", "rings", "halves", "triangles", "diamonds", "crosses", "scales", "stars")  # without a word


def _generator(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def _show(individual: Individuals, scene: int | None, generator: torch.Generator) -> Image.Image:
    views = sample_views(1, generator, scene_index=scene)
    return to_images(render(individual, views, supersampling=1).images)[0]


def captioned_image(
    rng: np.random.Generator, class_name: str | None = None, scene: str | None = None, color: str | None = None
) -> Image.Image:
    """An image of a thing in a scene, whose pattern and color have words; what is not given is random."""
    given = ((CLASSES, class_name), (tuple(SCENES), scene), (tuple(COLORS), color), (PATTERNS, None))
    words = [int(rng.integers(len(names))) if name is None else names.index(name) for names, name in given]
    generator = _generator(rng)
    individual = individuals_of(make_captions(*torch.tensor(words)[:, None]), generator)
    return _show(individual, words[1], generator)


def class_image(class_name: str, rng: np.random.Generator) -> Image.Image:
    """A thing of this class in a random scene, in a color and a pattern that have words."""
    return captioned_image(rng, class_name)


def pattern_image(pattern: str, rng: np.random.Generator) -> Image.Image:
    """An ink drawing of a thing of any class in any scene that has a pattern of this family."""
    generator = _generator(rng)
    individual = draw_individuals(1, generator, family=FAMILY_NAMES.index(pattern))
    return ink(_show(individual, None, generator), rng)


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
