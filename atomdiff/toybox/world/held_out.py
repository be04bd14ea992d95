"""What pretraining never shows: families of patterns, a band of hues, and individuals like the subjects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from atomdiff.toybox.world.individuals import Individuals, draw_individuals
from atomdiff.toybox.world.patterns import FAMILY_NAMES, HELD_OUT_FAMILIES
from atomdiff.toybox.world.subjects import all_subjects

HELD_OUT_HUES = (160.0, 192.0)  # degrees: turquoise
_HELD_OUT_SATURATION = 0.25
_HELD_OUT_FAMILY = torch.tensor([FAMILY_NAMES.index(name) for name in HELD_OUT_FAMILIES])
_NEAR = 0.14  # mean absolute difference of the parameters within which an individual is too like a subject
_NEAR_COLOR = 0.10


def hue_and_saturation(colors: Tensor) -> tuple[Tensor, Tensor]:
    """Hue in degrees and saturation in [0, 1] (as in HSV) of colors (..., 3)."""
    red, green, blue = colors.unbind(-1)
    high, spread = colors.amax(-1), colors.amax(-1) - colors.amin(-1)
    safe = spread.clamp(min=1e-6)
    sixth = torch.where(
        high == red,
        torch.remainder((green - blue) / safe, 6),
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return sixth * 60, spread / high.clamp(min=1e-6)


def color_is_held_out(colors: Tensor) -> Tensor:
    """Whether colors (..., 3) lie in the band of hues that the base world never shows."""
    hue, saturation = hue_and_saturation(colors)
    low, high = HELD_OUT_HUES
    return (hue > low) & (hue < high) & (saturation > _HELD_OUT_SATURATION)


def is_near(individuals: Individuals, subjects: Individuals) -> Tensor:
    """Whether individuals (n,) are too like one of the subjects (m,): by shape, by pattern, or by their two colors.

    An individual is near a subject if class and shape are, if class, family and pattern are, or if both colors are.
    """
    same_class = individuals.class_index[:, None] == subjects.class_index[None]
    same_family = individuals.family[:, None] == subjects.family[None]
    shape = (individuals.shape[:, None] - subjects.shape[None]).abs().mean(2)
    pattern = (individuals.pattern[:, None] - subjects.pattern[None]).abs().mean(2)
    color = (individuals.colors[:, None, :2] - subjects.colors[None, :, :2]).abs().amax((2, 3))
    near = (same_class & (shape < _NEAR)) | (same_class & same_family & (pattern < _NEAR)) | (color < _NEAR_COLOR)
    return near.any(1)


def is_held_out(individuals: Individuals) -> Tensor:
    """Whether individuals (n,) are kept out of pretraining, (n,) bool.

    Held out are whole families of patterns, a band of hues, and the neighborhoods of all subjects.
    """
    family = torch.isin(individuals.family, _HELD_OUT_FAMILY.to(individuals.device))
    color = color_is_held_out(individuals.colors).any(1)
    return family | color | is_near(individuals, all_subjects().to(individuals.device))


def replace_held_out(individuals: Individuals, draw: Callable[[Tensor], Individuals]) -> Individuals:
    """Draw held-out individuals anew, in place, until there are none; `draw` gets the indices of those to draw."""
    while (held_out := is_held_out(individuals)).any():
        rows = held_out.nonzero()[:, 0]
        drawn = draw(rows)
        for field in fields(individuals):
            getattr(individuals, field.name)[rows] = getattr(drawn, field.name)
    return individuals


def sample_individuals(
    n: int,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    class_index: Tensor | int | None = None,
    family: Tensor | int | None = None,
) -> Individuals:
    """Individuals of the base world, never held out.

    Args:
        n: how many.
        generator: a generator on the CPU, so that all devices see the same world.
        device: where the result goes.
        class_index: class of all, or of each (n,); drawn where None.
        family: pattern family of all, or of each (n,); drawn where None.

    Raises:
        ValueError: a held-out family was asked for.
    """
    if family is not None and torch.isin(torch.as_tensor(family), _HELD_OUT_FAMILY).any():
        raise ValueError(f"family {family}: {', '.join(HELD_OUT_FAMILIES)} are held out; use draw_individuals")
    result = draw_individuals(n, generator, class_index, family)
    return replace_held_out(
        result, lambda rows: draw_individuals(len(rows), generator, result.class_index[rows], result.family[rows])
    ).to(device)
