"""The families of surface patterns: how much of the second color shows at each point, for continuous parameters.

A family is a function of coordinates (n, h, w) in object units, parameters (n, P) in [0, 1] and the size of a pixel in
object units; it returns the share of the second color (n, h, w) in [0, 1]. The parameters are, in this order, angle,
frequency, two phases, duty (or size), and one of the family's own (amplitude, stagger, aspect ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atomdiff.toybox.world.distances import length

PARAMETERS = 6
Family = Callable[["Surface"], Tensor]


class Surface:
    """The points of some images at which one family is evaluated, in coordinates turned by the pattern's angle."""

    def __init__(self, x: Tensor, y: Tensor, parameters: Tensor, pixel: Tensor) -> None:
        angle, frequency, phase, other, duty, own = parameters[:, :, None, None].unbind(1)
        self.angle, self.phase, self.other, self.duty, self.own = angle, phase, other, duty, own
        self.frequency = 2.8 * 2.2**frequency  # periods in one unit: 2.8 to 6.2
        cosine, sine = (angle * math.pi).cos(), (angle * math.pi).sin()
        self.x, self.y, self.pixel = x, y - 0.5, pixel
        self.u = x * cosine + self.y * sine
        self.v = self.y * cosine - x * sine

    def edge(self, inside: Tensor) -> Tensor:
        """Coverage of a pixel for a distance that is positive inside."""
        return (0.5 + inside / self.pixel).clamp(0, 1)

    def between(self, low: float, high: float, value: Tensor) -> Tensor:
        """A parameter of [0, 1] brought to [low, high]."""
        return low + (high - low) * value

    def lattice(self, stagger: Tensor | float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Offsets from the middle of the cell, in periods; every other row is shifted by `stagger` periods."""
        u, v = self.u * self.frequency * scale + self.phase, self.v * self.frequency * scale + self.other
        row = v.floor()
        u = u + stagger * torch.remainder(row, 2)
        return u - u.floor() - 0.5, v - row - 0.5


def _band(t: Tensor, width: Tensor | float) -> Tensor:
    """Distance inside a band of `width` around the middle of each unit period, in periods."""
    return width / 2 - (t - t.floor() - 0.5).abs()


def _plain(s: Surface) -> Tensor:
    return torch.zeros_like(s.x)


def _stripes(s: Surface) -> Tensor:
    return s.edge(_band(s.u * s.frequency + s.phase, s.between(0.3, 0.7, s.duty)) / s.frequency)


def _bands(s: Surface) -> Tensor:
    t = s.u * s.frequency * 0.6 + s.phase
    wide, thin = s.between(0.2, 0.38, s.duty), s.between(0.06, 0.12, s.own)
    both = torch.maximum(_band(t, wide), _band(t + 0.12 + wide, thin))
    return s.edge(both / (s.frequency * 0.6))


def _dots(s: Surface) -> Tensor:
    u, v = s.lattice((s.own > 0.5) * 0.5)
    return s.edge((s.between(0.2, 0.38, s.duty) - length(u, v)) / s.frequency)


def _checks(s: Surface) -> Tensor:
    half = s.frequency * 0.7
    stretch = s.between(0.7, 1.4, s.own)
    a, b = _band(s.u * half + s.phase, 0.5), _band(s.v * half * stretch + s.other, 0.5)
    return s.edge((a * b).sign() * torch.minimum(a.abs(), b.abs() / stretch) / half)


def _zigzag(s: Surface) -> Tensor:
    run, rise = s.frequency * 0.55, s.between(0.35, 0.8, s.own)
    fold = (s.u * run + s.other - (s.u * run + s.other).floor() - 0.5).abs() * 2 * rise
    steep = torch.sqrt(1 + (2 * rise * run / s.frequency) ** 2)
    return s.edge(
        _band(s.v * s.frequency * 0.9 + fold + s.phase, s.between(0.35, 0.65, s.duty)) / (s.frequency * steep)
    )


def _waves(s: Surface) -> Tensor:
    rise, run = s.between(0.12, 0.34, s.own), s.frequency * 0.6
    swing = rise * torch.sin(2 * math.pi * (s.u * run + s.other))
    return s.edge(_band(s.v * s.frequency * 0.9 + swing + s.phase, s.between(0.35, 0.65, s.duty)) / (s.frequency * 1.2))


def _plaid(s: Surface) -> Tensor:
    f = s.frequency * 0.75
    across = s.edge(_band(s.u * f + s.phase, s.between(0.25, 0.6, s.duty)) / f)
    along = s.edge(_band(s.v * f + s.other, s.between(0.25, 0.6, s.own)) / f)
    return 0.5 * (across + along)


def _rings(s: Surface) -> Tensor:
    reach = length(s.x - s.between(-0.3, 0.3, s.other), s.y - s.between(-0.3, 0.3, s.own))
    return s.edge(_band(reach * s.frequency + s.phase, s.between(0.35, 0.65, s.duty)) / s.frequency)


def _halves(s: Surface) -> Tensor:
    swing = s.between(0.0, 0.09, s.own) * torch.sin(2 * math.pi * (s.v * s.frequency * 0.8 + s.other))
    return s.edge(s.u + swing - s.between(-0.18, 0.18, s.phase))


def _blotches(s: Surface) -> Tensor:
    f = s.frequency * 2 * math.pi * 0.55
    noise = torch.sin(s.u * f + 2 * math.pi * s.phase)
    noise = noise + torch.sin((0.62 * s.v + 0.5 * s.u) * f * 1.27 + 2 * math.pi * s.other)
    noise = noise + torch.sin((0.81 * s.v - 0.59 * s.u) * f * 0.83 + 2 * math.pi * s.own)
    noise = noise + 0.5 * torch.sin((s.u + 1.1 * s.v) * f * 1.9 + 2 * math.pi * (s.own + s.phase))
    return s.edge((noise - s.between(-0.5, 0.8, s.duty)) / (f * 1.1))


def _triangles(s: Surface) -> Tensor:
    u, v = s.lattice(s.between(0.0, 0.5, s.own))
    size = s.between(0.72, 1.0, s.duty)
    slanted = ((0.5 * size - v) * 0.5 - u.abs() + 0.0 * v) * 0.9
    return s.edge(torch.minimum(slanted, v + 0.46 * size) / s.frequency)


def _diamonds(s: Surface) -> Tensor:
    u, v = s.lattice(0.5, 0.9)
    stretch = s.between(0.75, 1.3, s.own)
    return s.edge((s.between(0.28, 0.46, s.duty) - u.abs() * stretch - v.abs() / stretch) * 0.75 / s.frequency)


def _rays(s: Surface) -> Tensor:
    x, y = s.x - s.between(-0.25, 0.25, s.phase), s.y - s.between(-0.25, 0.25, s.other)
    count = torch.round(5 + 2.5 * (s.frequency - 2.8))
    turned = torch.atan2(x, y) / (2 * math.pi) * count + s.angle
    twist = s.between(-1.2, 1.2, s.own) * length(x, y)
    return s.edge(_band(turned + twist, s.between(0.35, 0.65, s.duty)) * 2 * math.pi * length(x, y) / count)


def _bricks(s: Surface) -> Tensor:
    stretch = s.between(0.45, 0.75, s.own)
    v = s.v * s.frequency * 1.15 + s.other
    row = v.floor()
    u = s.u * s.frequency * 1.15 * stretch + s.phase + 0.5 * torch.remainder(row, 2)
    across, along = 0.5 - (u - u.floor() - 0.5).abs(), 0.5 - (v - row - 0.5).abs()
    return s.edge((s.between(0.06, 0.16, s.duty) - torch.minimum(across / stretch, along)) / (s.frequency * 1.15))


def _crosses(s: Surface) -> Tensor:
    u, v = s.lattice(0.5, 0.85)
    long, wide = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    inside = torch.minimum(s.between(0.3, 0.42, s.own) - long, s.between(0.09, 0.16, s.duty) - wide)
    return s.edge(inside / (s.frequency * 0.85))


def _scales(s: Surface) -> Tensor:
    # Rows of round scales, each row overlapping the one above it: the lowest circle that holds a point is in front.
    f = s.frequency * 0.85
    u, v = s.u * f + s.phase, s.v * f + s.other
    row = (v * 2).floor()
    rest, shift = v - row / 2, 0.5 * torch.remainder(row, 2)
    behind = length(torch.remainder(u + shift, 1) - 0.5, rest - 0.5)
    front = length(torch.remainder(u + shift + 0.5, 1) - 0.5, rest)
    reach = torch.where(behind < 0.5, behind, front)
    rim = s.between(0.30, 0.38, s.duty)
    return s.edge(torch.maximum(reach - rim, s.between(-0.1, 0.17, s.own) - reach) / f)


def _stars(s: Surface) -> Tensor:
    u, v = s.lattice(0.5, 0.85)
    reach, slot = length(u, v), 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(u, v) + slot / 2, slot) - slot / 2).abs()
    outer = s.between(0.34, 0.46, s.duty)
    inner = outer * s.between(0.36, 0.55, s.own)
    # The edge from the tip (outer, 0) to the notch (inner at half a slot).
    nx, ny = inner * math.sin(slot / 2), outer - inner * math.cos(slot / 2)
    inside = (outer * nx - reach * (angle.cos() * nx + angle.sin() * ny)) / torch.sqrt(nx * nx + ny * ny)
    return s.edge(inside / (s.frequency * 0.85))


FAMILIES: dict[str, Family] = {
    "plain": _plain,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "zigzag": _zigzag,
    "waves": _waves,
    "plaid": _plaid,
    "bands": _bands,
    "rings": _rings,
    "halves": _halves,
    "blotches": _blotches,
    "triangles": _triangles,
    "diamonds": _diamonds,
    "rays": _rays,
    "bricks": _bricks,
    "crosses": _crosses,
    "scales": _scales,
    "stars": _stars,
}
FAMILY_NAMES = tuple(FAMILIES)
HELD_OUT_FAMILIES = ("crosses", "scales", "stars")

_Range = tuple[float, float]
# A pattern's word means one look: its family and a narrow range of each parameter, phases included. With phases drawn
# freely, the images of a word would look gray on average, and the training loss would hardly tell words apart.
_NAMED: dict[str, tuple[str, tuple[_Range, ...]]] = {
    "plain": ("plain", ((0, 1),) * PARAMETERS),
    "striped": ("stripes", ((0.0, 0.03), (0.35, 0.45), (0.22, 0.28), (0, 1), (0.45, 0.55), (0, 1))),
    "dotted": ("dots", ((0.0, 0.03), (0.55, 0.65), (0.47, 0.53), (0.47, 0.53), (0.5, 0.7), (0.6, 0.9))),
    "checked": ("checks", ((0.0, 0.03), (0.50, 0.60), (0.22, 0.28), (0.22, 0.28), (0, 1), (0.38, 0.48))),
    "zigzag": ("zigzag", ((0.0, 0.03), (0.45, 0.55), (0.22, 0.28), (0.47, 0.53), (0.45, 0.55), (0.55, 0.7))),
    "wavy": ("waves", ((0.47, 0.53), (0.42, 0.52), (0.22, 0.28), (0.22, 0.28), (0.45, 0.55), (0.6, 0.8))),
    "plaid": ("plaid", ((0.23, 0.27), (0.50, 0.60), (0.22, 0.28), (0.22, 0.28), (0.4, 0.6), (0.4, 0.6))),
}
PATTERNS = tuple(_NAMED)
NAMED_FAMILY = tuple(FAMILY_NAMES.index(family) for family, _ in _NAMED.values())


def named_ranges() -> tuple[Tensor, Tensor]:
    """Lowest and highest parameters of each pattern word: two tensors (words, P)."""
    ranges = torch.tensor([spans for _, spans in _NAMED.values()])
    return ranges[..., 0], ranges[..., 1]
