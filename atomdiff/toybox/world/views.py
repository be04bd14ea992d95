"""Views: how and where an individual is seen once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.toybox.world.batch import Batch
from atomdiff.toybox.world.words import SCENES

LAYOUT = 40


@dataclass(frozen=True)
class Views(Batch):
    """A batch of n appearances.

    Attributes:
        scene_index: index into `SCENES`, (n,) long.
        layout: random numbers of the scene in [0, 1], (n, L).
        foot: where the thing stands, x and y from the top left corner of the image, in image sides, (n, 2).
        size: height of a thing of height 1, in image sides, (n,).
        tilt: radians, counter-clockwise, (n,).
        mirror: 1 or -1 (seen from the other side), (n,).
        light: where the light comes from, -1 (left) to 1 (right), (n,).
        tint: factor of each color channel, (n, 3).
    """

    scene_index: Tensor
    layout: Tensor
    foot: Tensor
    size: Tensor
    tilt: Tensor
    mirror: Tensor
    light: Tensor
    tint: Tensor


def sample_views(
    n: int,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    scene_index: Tensor | int | None = None,
) -> Views:
    """Random appearances.

    Args:
        n: how many.
        generator: a generator on the CPU, so that all devices see the same world.
        device: where the result goes.
        scene_index: scene of all, or of each (n,); drawn where None.
    """
    scenes = torch.randint(len(SCENES), (n,), generator=generator)
    if scene_index is not None:
        scenes = torch.as_tensor(scene_index, dtype=torch.long, device="cpu").expand(n).clone()
    layout = torch.rand(n, LAYOUT, generator=generator)
    draw = torch.rand(n, 8, generator=generator)
    size = 0.60 + 0.20 * draw[:, 0]
    foot = torch.stack([0.5 + (draw[:, 1] - 0.5) * (1 - size) * 0.6, 0.88 + 0.07 * draw[:, 2]], 1)
    warmth = (draw[:, 6] - 0.5) * 0.08
    tint = (0.95 + 0.12 * draw[:, 5])[:, None] * (1 + warmth[:, None] * torch.tensor([1.0, 0.0, -1.0]))
    views = Views(
        scenes,
        layout,
        foot,
        size,
        (draw[:, 3] - 0.5) * 0.24,
        torch.where(draw[:, 4] < 0.5, 1.0, -1.0),
        draw[:, 7] * 2 - 1,
        tint,
    )
    return views.to(device)
