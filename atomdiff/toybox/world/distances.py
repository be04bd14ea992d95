"""Signed distances to simple shapes, negative inside: the geometry of everything that the world draws.

Coordinates `x` and `y` are (n, h, w); every other argument is a number or (n, 1, 1). Distances come as (n, h, w) in the
units of the coordinates, exact near the edge, which is all that outlines and anti-aliasing need.
"""

from __future__ import annotations

import torch
from torch import Tensor

Value = Tensor | float


def length(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean length of the vectors (x, y)."""
    return torch.sqrt(x * x + y * y + 1e-12)


def lengths(x: Value, y: Value) -> Value:
    """Euclidean length where both are numbers or both are tensors."""
    return (x * x + y * y + 1e-12) ** 0.5


def circle(x: Tensor, y: Tensor, cx: Value, cy: Value, radius: Value) -> Tensor:
    """A disc around (cx, cy)."""
    return length(x - cx, y - cy) - radius


def ellipse(x: Tensor, y: Tensor, cx: Value, cy: Value, rx: Value, ry: Value) -> Tensor:
    """An ellipse with half axes rx and ry, to first order."""
    u, v = (x - cx) / rx, (y - cy) / ry
    reach = length(u, v)
    return reach * (reach - 1) / length(u / rx, v / ry)


def box(
    x: Tensor, y: Tensor, cx: Value, cy: Value, half_width: Value, half_height: Value, radius: Value = 0.0
) -> Tensor:
    """A rectangle with corners rounded by `radius`."""
    u, v = (x - cx).abs() - half_width + radius, (y - cy).abs() - half_height + radius
    return length(u.clamp(min=0), v.clamp(min=0)) + torch.maximum(u, v).clamp(max=0) - radius


def line(x: Tensor, y: Tensor, x0: Value, y0: Value, x1: Value, y1: Value, radius: Value) -> Tensor:
    """A stroke with round ends, `radius` to each side of the segment."""
    return _segment(x, y, x0, y0, x1, y1)[1] - radius


def cone(x: Tensor, y: Tensor, x0: Value, y0: Value, x1: Value, y1: Value, r0: Value, r1: Value) -> Tensor:
    """A stroke whose radius goes from r0 at the first end to r1 at the second."""
    along, away = _segment(x, y, x0, y0, x1, y1)
    return away - (r0 + (r1 - r0) * along)


def _segment(x: Tensor, y: Tensor, x0: Value, y0: Value, x1: Value, y1: Value) -> tuple[Tensor, Tensor]:
    """How far along a segment its nearest point is, from 0 to 1, and the distance to it."""
    dx, dy = x1 - x0, y1 - y0
    u, v = x - x0, y - y0
    along = ((u * dx + v * dy) / (dx * dx + dy * dy + 1e-12)).clamp(0, 1)
    return along, length(u - along * dx, v - along * dy)


def half_plane(x: Tensor, y: Tensor, x0: Value, y0: Value, x1: Value, y1: Value) -> Tensor:
    """The side to the left of the way from the first point to the second (y up)."""
    dx, dy = x1 - x0, y1 - y0
    size = lengths(dx, dy)
    return (x - x0) * (dy / size) - (y - y0) * (dx / size)


def polygon(x: Tensor, y: Tensor, *points: tuple[Value, Value], radius: Value = 0.0) -> Tensor:
    """A convex polygon, its points counter-clockwise (y up), with corners rounded by about `radius`."""
    result: Tensor | None = None
    for (x0, y0), (x1, y1) in zip(points, (*points[1:], points[0]), strict=True):
        side = half_plane(x, y, x0, y0, x1, y1)
        if result is None:
            result = side
        elif isinstance(radius, float) and radius == 0:
            result = torch.maximum(result, side)
        else:
            result = both(result, side, radius)
    assert result is not None
    return result


def taper(x: Tensor, y: Tensor, bottom: Value, top: Value, r_bottom: Value, r_top: Value, radius: Value) -> Tensor:
    """A trapezoid upright around x = 0 whose half width goes from r_bottom to r_top."""
    height = top - bottom
    slope = (r_top - r_bottom) / height
    side = (x.abs() - r_bottom - (y - bottom) * slope) / lengths(slope, slope * 0 + 1)
    ends = torch.maximum(bottom - y, y - top)
    return both(side, ends, radius)


def ring(distance: Tensor, half_width: Value) -> Tensor:
    """The band along the edge of a shape."""
    return distance.abs() - half_width


def both(one: Tensor, other: Tensor, radius: Value) -> Tensor:
    """Where two shapes overlap, with the corner between them rounded by `radius` (polynomial smooth maximum)."""
    near = (radius - (one - other).abs()).clamp(min=0)
    return torch.maximum(one, other) + near * near / (4 * radius)


def either(one: Tensor, other: Tensor, radius: Value) -> Tensor:
    """Two shapes grown together, with a fillet of `radius` (polynomial smooth minimum)."""
    near = (radius - (one - other).abs()).clamp(min=0)
    return torch.minimum(one, other) - near * near / (4 * radius)


def turn(x: Tensor, y: Tensor, cx: Value, cy: Value, angle: Tensor | float) -> tuple[Tensor, Tensor]:
    """Coordinates around (cx, cy), turned so that what is drawn upright appears turned by `angle` (radians, y up)."""
    radians = torch.as_tensor(angle, device=x.device, dtype=x.dtype)
    cosine, sine = radians.cos(), radians.sin()
    u, v = x - cx, y - cy
    return u * cosine + v * sine, v * cosine - u * sine
