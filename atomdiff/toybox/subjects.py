"""Individuals that the base has never seen and has no words for: unseen patterns in unseen colors."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from atomdiff.toybox.scenes import CLASSES, SCENES, Individual, distance, draw, random_palette
from atomdiff.toybox.shapes import PATTERNS, SUBJECT_COLORS, SUBJECT_PATTERNS


def _subject(class_name: str, pattern: str, first: str, second: str) -> Individual:
    return Individual(class_name, pattern, SUBJECT_COLORS[first], SUBJECT_COLORS[second])


SUBJECTS: dict[str, Individual] = {
    "mug": _subject("mug", "zigzag", "turquoise", "magenta"),
    "robot": _subject("robot", "rings", "lime", "indigo"),
    "cat": _subject("cat", "bands", "lavender", "maroon"),
    "car": _subject("car", "waves", "magenta", "mint"),
    "teapot": _subject("teapot", "diamonds", "indigo", "cyan"),
    "bird": _subject("bird", "halves", "salmon", "olive"),
    "mushroom": _subject("mushroom", "crosses", "olive", "lavender"),
    "boat": _subject("boat", "triangles", "maroon", "lime"),
}
_TAKEN = {(subject.class_name, subject.pattern) for subject in SUBJECTS.values()}


def random_individual(rng: np.random.Generator, class_name: str | None = None) -> Individual:
    """An individual of any pattern and any two clearly different colors, but never one like a shipped subject."""
    while True:
        kind = class_name or str(rng.choice(CLASSES))
        pattern = str(rng.choice([*PATTERNS, *SUBJECT_PATTERNS]))
        first, second = random_palette(rng)
        if (kind, pattern) not in _TAKEN and distance(first, second) > 180:
            return Individual(kind, pattern, first, second, (rng.random(), rng.random()))


def views(individual: Individual, count: int, seed: int, scenes: tuple[str, ...] = SCENES) -> list[Image.Image]:
    """Images of one individual in the given scenes in turn, deterministic from the seed."""
    rng = np.random.default_rng(seed)
    return [draw(individual, scene, rng) for scene in itertools.islice(itertools.cycle(scenes), count)]
