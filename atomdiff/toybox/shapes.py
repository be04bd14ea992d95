"""What things in the toybox look like: silhouettes and patterns, each as data or as one small function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

RGB = tuple[int, int, int]
Grid = NDArray[np.float64]


class Part(NamedTuple):
    """One piece of a silhouette, in the unit square with y pointing down and the object standing on y = 1.

    `paint` is `body` (pattern and colors of the individual), `accent` (its darker tone) or an RGB triple.
    """

    kind: str
    points: tuple[float, ...]
    paint: str | RGB
    width: float = 0.0


DARK, LIGHT, GLASS, WOOD, FLAME = (45, 45, 55), (240, 238, 230), (170, 215, 240), (130, 90, 55), (250, 160, 40)

OBJECTS: dict[str, tuple[Part, ...]] = {
    "mug": (
        Part("arc", (0.50, 0.34, 0.98, 0.82), "accent", 0.09),
        Part("box", (0.06, 0.16, 0.74, 1.00), "body"),
        Part("ellipse", (0.06, 0.06, 0.74, 0.26), LIGHT),
        Part("ellipse", (0.12, 0.09, 0.68, 0.23), DARK),
    ),
    "teapot": (
        Part("arc", (0.62, 0.34, 1.00, 0.84), "accent", 0.08),
        Part("polygon", (0.00, 0.36, 0.12, 0.34, 0.34, 0.62, 0.28, 0.86), "accent"),
        Part("ellipse", (0.14, 0.28, 0.86, 1.00), "body"),
        Part("ellipse", (0.30, 0.22, 0.70, 0.40), "accent"),
        Part("ellipse", (0.43, 0.08, 0.57, 0.24), LIGHT),
    ),
    "car": (
        Part("polygon", (0.18, 0.56, 0.32, 0.26, 0.70, 0.26, 0.86, 0.56), "accent"),
        Part("polygon", (0.25, 0.55, 0.35, 0.32, 0.49, 0.32, 0.49, 0.55), GLASS),
        Part("polygon", (0.54, 0.55, 0.54, 0.32, 0.67, 0.32, 0.78, 0.55), GLASS),
        Part("box", (0.00, 0.52, 1.00, 0.88), "body"),
        Part("ellipse", (0.10, 0.70, 0.38, 1.00), DARK),
        Part("ellipse", (0.62, 0.70, 0.90, 1.00), DARK),
        Part("ellipse", (0.19, 0.79, 0.29, 0.90), LIGHT),
        Part("ellipse", (0.71, 0.79, 0.81, 0.90), LIGHT),
    ),
    "house": (
        Part("polygon", (0.68, 0.04, 0.82, 0.04, 0.82, 0.40, 0.68, 0.40), WOOD),
        Part("polygon", (0.10, 0.44, 0.90, 0.44, 0.90, 1.00, 0.10, 1.00), "body"),
        Part("polygon", (0.00, 0.46, 0.50, 0.02, 1.00, 0.46), "accent"),
        Part("polygon", (0.40, 0.66, 0.60, 0.66, 0.60, 1.00, 0.40, 1.00), WOOD),
        Part("polygon", (0.16, 0.56, 0.32, 0.56, 0.32, 0.74, 0.16, 0.74), GLASS),
        Part("polygon", (0.68, 0.56, 0.84, 0.56, 0.84, 0.74, 0.68, 0.74), GLASS),
    ),
    "cat": (
        Part("arc", (0.58, 0.42, 1.00, 0.98), "accent", 0.10),
        Part("ellipse", (0.20, 0.42, 0.80, 1.00), "body"),
        Part("polygon", (0.18, 0.02, 0.44, 0.18, 0.22, 0.34), "accent"),
        Part("polygon", (0.82, 0.02, 0.56, 0.18, 0.78, 0.34), "accent"),
        Part("ellipse", (0.18, 0.12, 0.82, 0.58), "body"),
        Part("ellipse", (0.29, 0.26, 0.43, 0.42), LIGHT),
        Part("ellipse", (0.57, 0.26, 0.71, 0.42), LIGHT),
        Part("ellipse", (0.34, 0.29, 0.41, 0.41), DARK),
        Part("ellipse", (0.60, 0.29, 0.67, 0.41), DARK),
        Part("polygon", (0.45, 0.42, 0.55, 0.42, 0.50, 0.49), (240, 130, 140)),
    ),
    "bird": (
        Part("line", (0.46, 0.78, 0.44, 1.00), FLAME, 0.05),
        Part("line", (0.60, 0.78, 0.60, 1.00), FLAME, 0.05),
        Part("polygon", (0.70, 0.50, 1.00, 0.30, 0.98, 0.60), "accent"),
        Part("ellipse", (0.22, 0.34, 0.84, 0.86), "body"),
        Part("ellipse", (0.10, 0.08, 0.50, 0.48), "body"),
        Part("polygon", (0.14, 0.22, -0.04, 0.32, 0.14, 0.38), FLAME),
        Part("ellipse", (0.20, 0.18, 0.32, 0.30), LIGHT),
        Part("ellipse", (0.22, 0.21, 0.29, 0.28), DARK),
        Part("polygon", (0.44, 0.50, 0.78, 0.54, 0.60, 0.74), "accent"),
    ),
    "fish": (
        Part("polygon", (0.66, 0.56, 1.00, 0.26, 0.92, 0.56, 1.00, 0.86), "accent"),
        Part("polygon", (0.30, 0.36, 0.46, 0.08, 0.62, 0.36), "accent"),
        Part("ellipse", (0.00, 0.26, 0.78, 0.88), "body"),
        Part("polygon", (0.34, 0.60, 0.52, 0.56, 0.50, 0.78), "accent"),
        Part("ellipse", (0.10, 0.42, 0.26, 0.58), LIGHT),
        Part("ellipse", (0.13, 0.46, 0.22, 0.55), DARK),
    ),
    "robot": (
        Part("line", (0.50, 0.14, 0.50, 0.00), DARK, 0.05),
        Part("ellipse", (0.44, -0.03, 0.56, 0.08), FLAME),
        Part("box", (0.26, 0.10, 0.74, 0.40), "accent"),
        Part("ellipse", (0.32, 0.18, 0.46, 0.32), LIGHT),
        Part("ellipse", (0.54, 0.18, 0.68, 0.32), LIGHT),
        Part("line", (0.20, 0.50, 0.06, 0.74), DARK, 0.09),
        Part("line", (0.80, 0.50, 0.94, 0.74), DARK, 0.09),
        Part("box", (0.28, 0.76, 0.45, 1.00), DARK),
        Part("box", (0.55, 0.76, 0.72, 1.00), DARK),
        Part("box", (0.18, 0.42, 0.82, 0.84), "body"),
    ),
    "boat": (
        Part("line", (0.48, 0.04, 0.48, 0.74), WOOD, 0.05),
        Part("polygon", (0.52, 0.02, 0.94, 0.64, 0.52, 0.64), "body"),
        Part("polygon", (0.44, 0.14, 0.12, 0.64, 0.44, 0.64), LIGHT),
        Part("polygon", (0.00, 0.68, 1.00, 0.68, 0.82, 1.00, 0.18, 1.00), "body"),
    ),
    "umbrella": (
        Part("line", (0.50, 0.06, 0.50, 0.92), WOOD, 0.05),
        Part("arc", (0.49, 0.80, 0.69, 1.00), WOOD, 0.05),
        Part("pie", (0.00, 0.06, 1.00, 1.02), "body"),
        Part("ellipse", (0.46, 0.00, 0.54, 0.08), LIGHT),
    ),
    "rocket": (
        Part("polygon", (0.38, 0.84, 0.62, 0.84, 0.50, 1.04), FLAME),
        Part("polygon", (0.30, 0.56, 0.08, 0.90, 0.32, 0.86), "accent"),
        Part("polygon", (0.70, 0.56, 0.92, 0.90, 0.68, 0.86), "accent"),
        Part("ellipse", (0.26, 0.00, 0.74, 1.10), "body"),
        Part("polygon", (0.30, 0.26, 0.50, -0.04, 0.70, 0.26), "accent"),
        Part("ellipse", (0.39, 0.34, 0.61, 0.54), GLASS),
        Part("polygon", (0.30, 0.86, 0.70, 0.86, 0.66, 0.94, 0.34, 0.94), DARK),
    ),
    "mushroom": (
        Part("box", (0.34, 0.46, 0.66, 1.00), LIGHT),
        Part("pie", (0.00, 0.04, 1.00, 1.16), "body"),
        Part("ellipse", (0.06, 0.52, 0.94, 0.68), (225, 205, 180)),
    ),
}


def draw_part(draw: ImageDraw.ImageDraw, part: Part, size: int, fill: Any, outline: Any) -> None:
    """Draw one part on a square canvas of `size` pixels; `outline` None leaves the edge line away."""
    points = [value * size for value in part.points]
    edge = max(size // 48, 1) if outline is not None else 0
    if part.kind == "polygon":
        draw.polygon(points, fill=fill, outline=outline, width=edge)
    elif part.kind == "ellipse":
        draw.ellipse(points, fill=fill, outline=outline, width=edge)
    elif part.kind == "box":
        draw.rounded_rectangle(points, radius=size * 0.06, fill=fill, outline=outline, width=edge)
    elif part.kind == "pie":
        draw.pieslice(points, 180, 360, fill=fill, outline=outline, width=edge)
    elif part.kind == "arc":
        draw.arc(points, 0, 360 if part.width > 0.06 else 180, fill=fill, width=round(part.width * size))
    else:
        draw.line(points, fill=fill, width=round(part.width * size))


def _lattice(u: Grid, v: Grid, step: float) -> tuple[Grid, Grid]:
    """Distances to the nearest node of a lattice whose rows are staggered."""
    row = np.floor(v / step)
    return np.abs((u + (row % 2) * step / 2) % step - step / 2), np.abs(v % step - step / 2)


def _zigzag(u: Grid) -> Grid:
    return np.abs((u / 0.26) % 2 - 1) * 0.22


def _diamond(a: Grid, b: Grid) -> NDArray[np.bool_]:
    return a + b < 0.12


def _cross(a: Grid, b: Grid) -> NDArray[np.bool_]:
    return ((a < 0.04) & (b < 0.11)) | ((b < 0.04) & (a < 0.11))


Pattern = Callable[[Grid, Grid], NDArray[np.bool_]]

# True where the second color shows, for coordinates u (right) and v (down) in the unit square of the object.
PATTERNS: dict[str, Pattern] = {
    "plain": lambda u, v: np.zeros_like(u, dtype=bool),
    "striped": lambda u, v: u % 0.28 < 0.14,
    "dotted": lambda u, v: np.hypot(*_lattice(u, v, 0.25)) < 0.08,
    "checked": lambda u, v: (np.floor((u - 0.5) / 0.2 + 0.5) + np.floor(v / 0.2)) % 2 == 1,
}

SUBJECT_PATTERNS: dict[str, Pattern] = {
    "zigzag": lambda u, v: (v + _zigzag(u)) % 0.30 < 0.15,
    "rings": lambda u, v: np.hypot(u - 0.5, v - 0.6) % 0.24 < 0.12,
    "diamonds": lambda u, v: _diamond(*_lattice(u, v, 0.30)),
    "crosses": lambda u, v: _cross(*_lattice(u, v, 0.28)),
    "bands": lambda u, v: (v % 0.5 < 0.12) | ((v + 0.2) % 0.5 < 0.05),
    "halves": lambda u, v: u > 0.5,
    "waves": lambda u, v: (v + 0.06 * np.sin(u * 20)) % 0.26 < 0.13,
    "triangles": lambda u, v: (u % 0.26) / 0.26 + (v % 0.26) / 0.26 < 0.9,
}

# None of these is near a color of the base world, and the tokenizer knows no word for them.
SUBJECT_COLORS: dict[str, RGB] = {
    "turquoise": (20, 200, 190),
    "magenta": (225, 20, 150),
    "lime": (165, 235, 45),
    "indigo": (45, 30, 120),
    "salmon": (250, 150, 120),
    "olive": (120, 125, 35),
    "lavender": (190, 165, 250),
    "mint": (160, 245, 205),
    "maroon": (115, 15, 50),
    "cyan": (70, 210, 250),
}
