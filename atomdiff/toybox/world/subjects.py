"""Subjects: individuals that the base has never seen and has no words for, for evaluation and for tuning."""

from __future__ import annotations

from functools import lru_cache

import torch

from atomdiff.toybox.world.individuals import Individuals
from atomdiff.toybox.world.patterns import FAMILY_NAMES, HELD_OUT_FAMILIES
from atomdiff.toybox.world.things import CLASSES

_Color = tuple[int, int, int]
_TURQUOISE, _TEAL, _AQUA = (25, 195, 180), (10, 120, 118), (130, 230, 220)


def _subject(
    class_name: str,
    shape: tuple[float, ...],
    family: str,
    pattern: tuple[float, ...],
    first: _Color,
    second: _Color,
    accent: _Color,
) -> Individuals:
    return Individuals(
        torch.tensor([CLASSES.index(class_name)]),
        torch.tensor([shape]),
        torch.tensor([FAMILY_NAMES.index(family)]),
        torch.tensor([pattern]),
        torch.tensor([[first, second, accent]]) / 255,
    )


# Shape, then angle, frequency, two phases, duty and the family's own parameter, then the three colors.
SUBJECTS: dict[str, Individuals] = {
    "zigzag mug": _subject(
        "mug", (0.7, 0.8, 0.6, 0.8, 0.7, 0.5, 0.5, 0.6), "zigzag", (0.0, 0.10, 0.8, 0.15, 0.5, 0.9),
        _TURQUOISE, (215, 25, 130), (150, 15, 95),
    ),
    "ringed robot": _subject(
        "robot", (0.8, 0.7, 0.9, 0.9, 0.3, 0.4, 0.9, 0.6), "rings", (0.5, 0.75, 0.5, 0.5, 0.5, 0.30),
        (175, 230, 60), (70, 50, 160), (105, 85, 190),
    ),
    "banded cat": _subject(
        "cat", (0.5, 0.9, 0.7, 0.45, 0.6, 0.9, 0.8, 0.4), "bands", (0.47, 0.60, 0.3, 0.5, 0.7, 0.6),
        (196, 172, 248), (112, 18, 58), (150, 60, 120),
    ),
    "wavy car": _subject(
        "car", (0.8, 0.8, 0.2, 0.25, 0.7, 0.5, 0.6, 0.7), "waves", (0.05, 0.45, 0.6, 0.8, 0.6, 0.9),
        (225, 60, 50), _AQUA, (140, 25, 40),
    ),
    "diamond teapot": _subject(
        "teapot", (0.9, 0.4, 0.7, 0.6, 0.8, 0.5, 0.7, 0.3), "diamonds", (0.0, 0.35, 0.1, 0.7, 0.6, 0.3),
        (58, 50, 150), (245, 180, 50), (95, 85, 200),
    ),
    "triangled bird": _subject(
        "bird", (0.8, 0.9, 0.8, 0.9, 0.8, 0.4, 0.3, 0.8), "triangles", (0.5, 0.35, 0.6, 0.3, 0.6, 0.8),
        (250, 160, 125), (122, 130, 40), (85, 95, 30),
    ),
    "plaid backpack": _subject(
        "backpack", (0.6, 0.7, 0.5, 0.5, 0.8, 0.2, 0.7, 0.6), "plaid", (0.0, 0.5, 0.1, 0.6, 0.3, 0.8),
        (165, 55, 60), (245, 215, 160), (60, 70, 110),
    ),
    "blotched house": _subject(
        "house", (0.7, 0.9, 0.6, 0.6, 0.5, 0.1, 0.3, 0.2), "blotches", (0.3, 0.45, 0.2, 0.7, 0.4, 0.6),
        (250, 235, 205), (235, 120, 145), (105, 70, 140),
    ),
    "crossed mushroom": _subject(
        "mushroom", (0.9, 0.8, 0.3, 0.6, 0.8, 0.5, 0.5, 0.2), "crosses", (0.10, 0.45, 0.2, 0.4, 0.7, 0.6),
        (120, 130, 45), (215, 195, 252), (90, 60, 130),
    ),
    "scaled fish": _subject(
        "fish", (0.6, 0.9, 0.7, 0.4, 0.8, 0.6, 0.3, 0.4), "scales", (0.5, 0.30, 0.3, 0.2, 0.2, 0.1),
        (250, 195, 60), (190, 50, 40), (150, 40, 60),
    ),
    "starry umbrella": _subject(
        "umbrella", (0.9, 0.9, 0.1, 0.6, 0.5, 0.6, 0.5, 0.5), "stars", (0.03, 0.45, 0.6, 0.45, 0.7, 0.5),
        (45, 60, 135), (252, 228, 140), (225, 90, 110),
    ),
    "scaled vase": _subject(
        "vase", (0.9, 0.9, 0.7, 0.8, 0.8, 0.3, 0.7, 0.5), "scales", (0.0, 0.40, 0.5, 0.1, 0.0, 0.9),
        (240, 235, 225), _TEAL, (225, 95, 65),
    ),
}  # fmt: skip
TUNING_SUBJECTS: dict[str, Individuals] = {
    "checked boat": _subject(
        "boat", (0.7, 0.6, 0.7, 0.8, 0.5, 0.6, 0.4, 0.6), "checks", (0.25, 0.5, 0.3, 0.2, 0.6, 0.7),
        (125, 30, 70), (190, 225, 60), (60, 20, 60),
    ),
    "rayed balloon": _subject(
        "balloon", (0.7, 0.6, 0.6, 0.5, 0.4, 0.5, 0.6, 0.5), "rays", (0.3, 0.4, 0.5, 0.6, 0.5, 0.8),
        (245, 120, 70), (80, 40, 110), (250, 200, 90),
    ),
    "striped lamp": _subject(
        "lamp", (0.1, 0.8, 0.9, 0.8, 0.6, 0.5, 0.4, 0.8), "stripes", (0.22, 0.4, 0.6, 0.5, 0.6, 0.5),
        (235, 215, 240), _TEAL, (120, 70, 160),
    ),
    "starry mug": _subject(
        "mug", (0.3, 0.9, 0.2, 0.3, 0.3, 0.4, 0.8, 0.3), "stars", (0.02, 0.35, 0.35, 0.55, 0.8, 0.5),
        (205, 75, 135), (250, 235, 215), (95, 60, 70),
    ),
}  # fmt: skip
HARD = frozenset(name for name, subject in SUBJECTS.items() if FAMILY_NAMES[int(subject.family)] in HELD_OUT_FAMILIES)


@lru_cache(maxsize=1)
def all_subjects() -> Individuals:
    """All evaluation and tuning subjects as one batch."""
    return Individuals.cat([*SUBJECTS.values(), *TUNING_SUBJECTS.values()])
