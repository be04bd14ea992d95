"""Many small things at random places in one evaluation: cells of a grid with random numbers of their own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from atomdiff.toybox.world.canvas import SceneCanvas

_TABLE = 1024


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """Fixed random numbers (1024, 3), the same on every device."""
    return torch.rand(_TABLE, 3, generator=torch.Generator().manual_seed(20)).to(device)


def _look_up(column: Tensor, row: Tensor | int, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = (column.long() * 37 + row * 211 + (key * _TABLE).long()).remainder(_TABLE)
    first, second, third = _table(column.device)[index].unbind(-1)
    return first, second, third


def columns(s: SceneCanvas, count: float, key: Tensor, jitter: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Things side by side: horizontal offset from the nearest one's middle (n, h, w), and two random numbers of it.

    Args:
        s: the scene.
        count: how many fit into the image.
        key: chooses the arrangement, (n, 1, 1) in [0, 1].
        jitter: how far a thing may move from its cell's middle, as a share of what keeps it inside.
    """
    t = s.x[:, :1] * count + key  # all rows alike: worked out for one, (n, 1, w)
    cell = t.floor()
    place, one, other = _look_up(cell, 0, key)
    return (t - cell - 0.5 - (place - 0.5) * jitter) / count, one, other


def grid(
    s: SceneCanvas, count: float, key: Tensor, jitter: float = 0.6, stretch: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Things all over: offsets x and y from the nearest one's middle, and a random number of it, each (n, h, w).

    Args:
        s: the scene.
        count: how many fit into the image's width.
        key: chooses the arrangement, (n, 1, 1) in [0, 1].
        jitter: how far a thing may move from its cell's middle, as a share of the cell.
        stretch: width of a cell over its height.
    """
    u, v = s.x * count + key * 3, s.y * count * stretch + key * 7
    column, row = u.floor(), v.floor()
    right, down, chance = _look_up(column, row.long(), key)
    across = (u - column - 0.5 - (right - 0.5) * jitter) / count
    return across, (v - row - 0.5 - (down - 0.5) * jitter) / (count * stretch), chance
