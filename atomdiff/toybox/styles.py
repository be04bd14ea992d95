"""Other ways to draw what the renderer drew; deterministic from a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image

_PAPERS = ((0.96, 0.90, 0.76), (0.84, 0.91, 0.87), (0.93, 0.84, 0.84), (0.86, 0.87, 0.94))
_INKS = ((0.12, 0.10, 0.16), (0.10, 0.14, 0.32), (0.28, 0.14, 0.10))


def ink(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw an image as outlines: one ink on tinted paper with grain, and no other color, area or shade is left.

    Args:
        image: RGB, of any size.
        rng: chooses paper, ink, the weight of the lines and the grain.
    """
    pixels = np.asarray(image, dtype=np.float64) / 255  # (h, w, 3)
    across = np.diff(pixels, axis=1, append=pixels[:, -1:])
    down = np.diff(pixels, axis=0, append=pixels[-1:])
    edges = np.hypot(across, down).max(axis=2, keepdims=True)  # (h, w, 1)
    lines = np.clip((edges - rng.uniform(0.05, 0.09)) / rng.uniform(0.15, 0.30), 0, 1)
    paper, color = rng.choice(_PAPERS), rng.choice(_INKS)
    sheet = paper + rng.normal(0, 0.035, lines.shape)
    drawn = sheet + (color - sheet) * 0.92 * lines  # (h, w, 3)
    return Image.fromarray((drawn.clip(0, 1) * 255).round().astype(np.uint8))
