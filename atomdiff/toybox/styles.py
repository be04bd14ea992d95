"""Other ways to draw what the renderer drew; deterministic from a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image

_Colors = tuple[tuple[float, float, float], ...]

_PAPERS = ((0.96, 0.90, 0.76), (0.84, 0.91, 0.87), (0.93, 0.84, 0.84), (0.86, 0.87, 0.94))
_INKS = ((0.12, 0.10, 0.16), (0.10, 0.14, 0.32), (0.28, 0.14, 0.10))
_SHEETS = ((0.98, 0.98, 0.98), (0.95, 0.95, 0.94))
_GRAPHITE = ((0.38, 0.38, 0.40), (0.50, 0.50, 0.50))
_BOARDS = ((0.10, 0.14, 0.12), (0.12, 0.12, 0.14), (0.09, 0.13, 0.18))
_CHALKS = ((0.92, 0.92, 0.88), (0.95, 0.86, 0.60), (0.70, 0.85, 0.95))


def ink(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw an image as outlines: one ink on tinted paper with grain, and no other color, area or shade is left.

    Args:
        image: RGB, of any size.
        rng: chooses paper, ink, the weight of the lines and the grain.
    """
    return _outline(image, _PAPERS, _INKS, rng)


def chalk(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw an image as outlines in chalk on a dark board; as `ink` in all else."""
    return _outline(image, _BOARDS, _CHALKS, rng)


def pencil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw an image as outlines in soft pencil on white paper; as `ink` in all else."""
    return _outline(image, _SHEETS, _GRAPHITE, rng)


def _outline(image: Image.Image, sheets: _Colors, lines: _Colors, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64) / 255  # (h, w, 3)
    across = np.diff(pixels, axis=1, append=pixels[:, -1:])
    down = np.diff(pixels, axis=0, append=pixels[-1:])
    edges = np.hypot(across, down).max(axis=2, keepdims=True)  # (h, w, 1)
    drawn = np.clip((edges - rng.uniform(0.05, 0.09)) / rng.uniform(0.15, 0.30), 0, 1)
    sheet, color = rng.choice(sheets), rng.choice(lines)
    grainy = sheet + rng.normal(0, 0.035, drawn.shape)
    mixed = grainy + (color - grainy) * 0.92 * drawn  # (h, w, 3)
    return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))
