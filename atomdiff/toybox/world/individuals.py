"""Individuals: one particular thing each, with its class, shape, pattern and colors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.toybox.world.batch import Batch
from atomdiff.toybox.world.patterns import FAMILY_NAMES, HELD_OUT_FAMILIES, PARAMETERS
from atomdiff.toybox.world.things import CLASSES, SHAPE_PARAMETERS

_BASE_FAMILIES = torch.tensor([i for i, name in enumerate(FAMILY_NAMES) if name not in HELD_OUT_FAMILIES])


@dataclass(frozen=True)
class Individuals(Batch):
    """A batch of n individuals.

    Attributes:
        class_index: index into `CLASSES`, (n,) long.
        shape: proportions, handles, ears, wheels ... in [0, 1], (n, S).
        family: index into `FAMILY_NAMES`, (n,) long.
        pattern: angle, frequency, phases, duty ... of the pattern in [0, 1], (n, P).
        colors: first, second and accent color in [0, 1], (n, 3, 3).
    """

    class_index: Tensor
    shape: Tensor
    family: Tensor
    pattern: Tensor
    colors: Tensor


def _from_hue(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colors (..., 3) of a hue (in turns), saturation and value, as in HSV."""
    sixths = torch.remainder(torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] * 6, 6)
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(sixths, 4 - sixths).clamp(0, 1))


def random_colors(n: int, generator: torch.Generator) -> Tensor:
    """Clearly different first and second colors and an accent, (n, 3, 3): half of them vivid, half from all the cube.

    The accent is a darker tone of the first color in two of three individuals, else free.
    """
    draw = torch.rand(n, 3, 3, generator=generator)
    vivid = _from_hue(draw[..., 0], 0.45 + 0.5 * draw[..., 1], 0.6 + 0.38 * draw[..., 2])
    colors = torch.where(torch.rand(n, 3, 1, generator=generator) < 0.5, vivid, 0.09 + 0.88 * draw)
    # A second color too like the first is pushed to the far side of the cube.
    first, second = colors[:, 0], colors[:, 1]
    close = (first - second).abs().sum(1, keepdim=True) < 0.75
    far = torch.where(first > 0.5, 0.30 * second, 1 - 0.30 * (1 - second))
    second = torch.where(close, far, second)
    darker = torch.rand(n, 1, generator=generator) < 0.66
    accent = torch.where(darker, first * 0.66, colors[:, 2])
    return torch.stack([first, second, accent], 1)


def random_families(n: int, generator: torch.Generator) -> Tensor:
    """Pattern families (n,) of the base world, evenly."""
    return _BASE_FAMILIES[torch.randint(len(_BASE_FAMILIES), (n,), generator=generator)]


def draw_individuals(
    n: int,
    generator: torch.Generator,
    class_index: Tensor | int | None = None,
    family: Tensor | int | None = None,
) -> Individuals:
    """Individuals from all of the world, held-out neighborhoods and hues included (families only where given)."""
    classes = torch.randint(len(CLASSES), (n,), generator=generator)
    families = random_families(n, generator)
    if class_index is not None:
        classes = torch.as_tensor(class_index, dtype=torch.long).expand(n).clone()
    if family is not None:
        families = torch.as_tensor(family, dtype=torch.long).expand(n).clone()
    return Individuals(
        classes,
        torch.rand(n, SHAPE_PARAMETERS, generator=generator),
        families,
        torch.rand(n, PARAMETERS, generator=generator),
        random_colors(n, generator),
    )
