"""The renderer: individuals seen in views, as images with the object's mask and its parts; the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from atomdiff.toybox.world import scenes_other, scenes_outside
from atomdiff.toybox.world.batch import groups
from atomdiff.toybox.world.canvas import OUTLINE, ObjectCanvas, SceneCanvas
from atomdiff.toybox.world.distances import ellipse
from atomdiff.toybox.world.individuals import Individuals
from atomdiff.toybox.world.patterns import FAMILIES, FAMILY_NAMES, Surface
from atomdiff.toybox.world.things import CLASSES, THINGS
from atomdiff.toybox.world.views import Views
from atomdiff.toybox.world.words import SCENES

IMAGE_SIZE = 128
_PAINTERS: dict[str, Callable[[SceneCanvas], None]] = {
    "beach": scenes_outside.beach,
    "forest": scenes_outside.forest,
    "desert": scenes_outside.desert,
    "snow": scenes_outside.snow,
    "city": scenes_outside.city,
    "kitchen": scenes_other.kitchen,
    "space": scenes_other.space,
    "sea": scenes_other.sea,
}


@dataclass(frozen=True)
class Rendering:
    """Images and what is known about them.

    Attributes:
        images: (n, 3, h, w) in [0, 1].
        mask: how much of each pixel the object covers, (n, 1, h, w) in [0, 1].
        parts: which of `PART_KINDS` each pixel shows, 0 for the background, (n, h, w) long.
    """

    images: Tensor
    mask: Tensor
    parts: Tensor


def _object_coordinates(views: Views, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Object coordinates x and y of a grid of pixels (n, h, w), and the size of a pixel in object units (n, 1, 1)."""
    axis = (torch.arange(size, device=views.device, dtype=torch.float32) + 0.5) / size
    scale = views.size[:, None, None]
    right = (axis.view(1, 1, size) - views.foot[:, 0, None, None]) / scale
    up = (views.foot[:, 1, None, None] - axis.view(1, size, 1)) / scale
    cosine, sine = views.tilt.cos()[:, None, None], views.tilt.sin()[:, None, None]
    x = (right * cosine + up * sine) * views.mirror[:, None, None]
    return x, up * cosine - right * sine, 1 / (size * scale)


def _paint_surfaces(individuals: Individuals, views: Views, size: int) -> Tensor:
    """The share of the second color at each pixel (n, h, w), as if the objects filled the images."""
    result = torch.empty(len(views), size, size, device=views.device)
    for family, rows in groups(individuals.family):
        x, y, pixel = _object_coordinates(views[rows], size)
        surface = Surface(x, y, individuals.pattern[rows], pixel)
        result[rows] = FAMILIES[FAMILY_NAMES[family]](surface)
    return result


def _paint_objects(
    individuals: Individuals, views: Views, size: int, supersampling: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Colors (n, 3, h, w), multiplied by the coverage (n, 1, h, w), and parts (n, h, w) of the objects alone."""
    n, device = len(individuals), views.device
    surfaces = _paint_surfaces(individuals, views, size * supersampling)
    color, alpha = torch.empty(n, 3, size, size, device=device), torch.empty(n, 1, size, size, device=device)
    parts = torch.empty(n, size, size, dtype=torch.long, device=device)
    for index, rows in groups(individuals.class_index):
        some, seen = individuals[rows], views[rows]
        x, y, pixel = _object_coordinates(seen, size * supersampling)
        side = (seen.light * seen.mirror)[:, None, None]
        canvas = ObjectCanvas(x, y, pixel, some.shape, surfaces[rows], some.colors, side, supersampling)
        THINGS[CLASSES[index]](canvas)
        color[rows] = F.avg_pool2d(canvas.rgb.clamp_(0, 1).mul_(canvas.alpha[:, None]), supersampling)
        covered = F.avg_pool2d(canvas.alpha[:, None], supersampling)
        kind = torch.where(canvas.kind == 0, float(OUTLINE), canvas.kind) * (covered[:, 0] >= 0.5)
        alpha[rows], parts[rows] = covered, kind.long()
    return color, alpha, parts


def _paint_scenes(views: Views, size: int) -> Tensor:
    """The scenes alone, with the shadow that the object casts, (n, 3, h, w)."""
    result = torch.empty(len(views), 3, size, size, device=views.device)
    names = list(SCENES)
    for index, rows in groups(views.scene_index):
        canvas = SceneCanvas(views.layout[rows], size)
        _PAINTERS[names[index]](canvas)
        foot, width = views.foot[rows, :, None, None], views.size[rows, None, None]
        lean = views.light[rows, None, None] * -0.06
        shadow = ellipse(canvas.x, canvas.y, foot[:, 0] + lean * width, foot[:, 1], 0.42 * width, 0.05 * width)
        canvas.fill(shadow, (12, 10, 30), 0.45, 7.0)
        result[rows] = canvas.rgb
    return result


@torch.no_grad()
def render(individuals: Individuals, views: Views, size: int = IMAGE_SIZE, supersampling: int = 2) -> Rendering:
    """Paint individuals in views, one each.

    Args:
        individuals: n individuals.
        views: as many views, on the same device.
        size: pixels a side.
        supersampling: pixels a side at which each pixel of the objects is painted.

    Raises:
        ValueError: the numbers of individuals and views differ.
    """
    if len(individuals) != len(views):
        raise ValueError(f"{len(individuals)} individuals and {len(views)} views: one view an individual is expected")
    color, alpha, parts = _paint_objects(individuals, views, size, supersampling)
    images = _paint_scenes(views, size) * (1 - alpha) + color
    images = (images * rearrange(views.tint, "n c -> n c 1 1")).clamp(0, 1)
    return Rendering(images, alpha, parts)
