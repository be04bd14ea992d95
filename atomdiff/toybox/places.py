"""The eight places of the toybox: each function paints one on a square canvas and varies it a little."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]


def _vary(rng: np.random.Generator, color: RGB, amount: int = 10) -> RGB:
    red, green, blue = (int(c) for c in np.clip(np.add(color, rng.integers(-amount, amount + 1)), 0, 255))
    return red, green, blue


class Brush:
    """A canvas of `size` pixels addressed in the unit square, with the randomness of one image."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image)
        self.size = size
        self.rng = rng

    def uniform(self, low: float, high: float) -> float:
        """One number between `low` and `high`."""
        return float(self.rng.uniform(low, high))

    def gradient(self, top: RGB, bottom: RGB, start: float = 0.0, end: float = 1.0) -> None:
        """Fill the rows from `start` to `end` with a vertical gradient."""
        first, last = round(start * self.size), round(end * self.size)
        ramp = np.linspace(_vary(self.rng, top), _vary(self.rng, bottom), max(last - first, 1))
        rows = np.repeat(ramp[:, None].astype(np.uint8), self.size, axis=1)
        self.image.paste(Image.fromarray(rows), (0, first))

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: RGB) -> None:
        """Draw an ellipse around (x, y)."""
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=_vary(self.rng, color))

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, color: RGB) -> None:
        """Draw a rectangle between two corners."""
        s = self.size
        self.draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=_vary(self.rng, color))

    def polygon(self, points: list[tuple[float, float]], color: RGB) -> None:
        """Draw a polygon."""
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=_vary(self.rng, color))


def _beach(b: Brush) -> None:
    horizon = b.uniform(0.42, 0.50)
    b.gradient((110, 190, 245), (200, 230, 250), 0, horizon)
    b.gradient((30, 110, 190), (70, 180, 210), horizon, horizon + 0.18)
    b.gradient((245, 225, 165), (225, 195, 130), horizon + 0.16, 1)
    b.ellipse(b.uniform(0.1, 0.9), b.uniform(0.08, 0.2), 0.08, 0.08, (255, 235, 110))


def _forest(b: Brush) -> None:
    b.gradient((150, 200, 170), (90, 150, 100), 0, 0.65)
    b.gradient((70, 120, 50), (45, 85, 35), 0.62, 1)
    for slot in range(5):
        x = (slot + b.uniform(0.2, 0.8)) / 5
        b.rectangle(x - 0.025, 0.2, x + 0.025, 0.68, (85, 60, 40))
        b.polygon([(x - 0.15, 0.48), (x, b.uniform(-0.08, 0.08)), (x + 0.15, 0.48)], (30, 95, 50))


def _desert(b: Brush) -> None:
    horizon = b.uniform(0.48, 0.55)
    b.gradient((250, 170, 90), (255, 215, 150), 0, horizon)
    b.gradient((220, 150, 80), (190, 115, 60), horizon, 1)
    for side in (b.uniform(0.08, 0.2), b.uniform(0.8, 0.92)):
        b.rectangle(side - 0.025, 0.28, side + 0.025, 0.62, (60, 120, 70))
        b.rectangle(side - 0.085, 0.38, side + 0.02, 0.42, (60, 120, 70))
        b.rectangle(side - 0.085, 0.32, side - 0.05, 0.42, (60, 120, 70))


def _snow(b: Brush) -> None:
    b.gradient((170, 195, 220), (215, 228, 240), 0, 0.6)
    for x in (b.uniform(0.0, 0.35), b.uniform(0.6, 1.0)):
        b.polygon([(x - 0.4, 0.6), (x, b.uniform(0.12, 0.25)), (x + 0.4, 0.6)], (125, 145, 175))
        b.polygon([(x - 0.12, 0.32), (x, 0.12), (x + 0.12, 0.32)], (245, 248, 252))
    b.gradient((245, 248, 252), (215, 225, 240), 0.57, 1)
    for _ in range(14):
        b.ellipse(b.uniform(0, 1), b.uniform(0, 0.9), 0.012, 0.012, (252, 252, 255))


def _city(b: Brush) -> None:
    b.gradient((175, 190, 215), (225, 215, 210), 0, 0.72)
    for slot in range(5):
        x, top = slot / 5, b.uniform(0.08, 0.38)
        tone = int(b.uniform(95, 150))
        b.rectangle(x + 0.01, top, x + 0.19, 0.74, (tone, tone, tone + 15))
        for row in range(3):
            for column in range(2):
                wx, wy = x + 0.045 + 0.07 * column, top + 0.06 + 0.11 * row
                b.rectangle(wx, wy, wx + 0.04, wy + 0.05, (245, 225, 140))
    b.rectangle(0, 0.72, 1, 1, (80, 82, 90))
    b.rectangle(0, 0.86, 1, 0.89, (235, 235, 225))


def _kitchen(b: Brush) -> None:
    b.rectangle(0, 0, 1, 0.72, (235, 215, 185))
    for row in range(4):
        b.rectangle(0, 0.17 * row, 1, 0.17 * row + 0.012, (200, 175, 140))
    offset = b.uniform(0, 0.2)
    for column in range(6):
        b.rectangle(column * 0.2 - offset, 0, column * 0.2 - offset + 0.012, 0.7, (200, 175, 140))
    x = 0.06 if b.uniform(0, 1) < 0.5 else 0.62
    b.rectangle(x, 0.08, x + 0.32, 0.4, (250, 250, 245))
    b.rectangle(x + 0.03, 0.11, x + 0.29, 0.37, (150, 205, 240))
    b.gradient((165, 110, 65), (125, 80, 45), 0.7, 1)


def _space(b: Brush) -> None:
    b.gradient((12, 10, 35), (35, 20, 65))
    for _ in range(26):
        b.ellipse(b.uniform(0, 1), b.uniform(0, 1), 0.010, 0.010, (235, 235, 245))
    x, y = b.uniform(0.1, 0.9), b.uniform(0.1, 0.25)
    b.ellipse(x, y, 0.11, 0.11, (215, 150, 105))
    b.ellipse(x - 0.03, y - 0.02, 0.03, 0.03, (180, 115, 80))


def _sea(b: Brush) -> None:
    b.gradient((60, 170, 200), (10, 60, 120))
    for x in (b.uniform(0.05, 0.3), b.uniform(0.7, 0.95)):
        for k in range(4):
            b.ellipse(x + 0.02 * (k % 2 * 2 - 1), 0.92 - 0.1 * k, 0.03, 0.08, (35, 130, 85))
    b.gradient((150, 150, 110), (120, 115, 85), 0.9, 1)
    for _ in range(7):
        b.ellipse(b.uniform(0, 1), b.uniform(0, 0.8), 0.02, 0.02, (170, 225, 240))


PLACES: dict[str, tuple[str, Callable[[Brush], None]]] = {
    "beach": ("on the beach", _beach),
    "forest": ("in the forest", _forest),
    "desert": ("in the desert", _desert),
    "snow": ("in the snow", _snow),
    "city": ("in the city", _city),
    "kitchen": ("in the kitchen", _kitchen),
    "space": ("in space", _space),
    "sea": ("under the sea", _sea),
}
