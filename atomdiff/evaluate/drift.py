"""Drift: how much a concept changes images that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from atomdiff.evaluate.suite import Evaluation


def drift(evaluation: Evaluation) -> float:
    """Return the drift of the images of unrelated prompts from the base's, from 0 to 1."""
    return mean_pixel_difference(evaluation.base.unrelated, evaluation.concept.unrelated)


def mean_pixel_difference(base: Sequence[Image.Image], adapted: Sequence[Image.Image]) -> float:
    """Return the mean over images of the root mean square pixel difference, from 0 (none) to 1 (black to white).

    Args:
        base: images by the bare base, for prompts that do not name the concept.
        adapted: images with the concept, from the same prompts and seeds in the same order.

    Raises:
        ValueError: there are no images, or their numbers or sizes differ.
    """
    if not base or len(base) != len(adapted):
        raise ValueError(f"found {len(base)} images by the base and {len(adapted)} adapted ones; give pairs")
    return float(np.mean([_rmse(*pair) for pair in zip(base, adapted, strict=True)]))


def _rmse(first: Image.Image, second: Image.Image) -> float:
    if first.size != second.size:
        raise ValueError(f"found images of {first.size} and {second.size} pixels; generate both in one size")
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (first, second))
    return float(np.sqrt(np.mean((one - other) ** 2)))
