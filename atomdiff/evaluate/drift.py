"""Drift: how much a concept changes images that have nothing to do with it, generated from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atomdiff.evaluate.similarity import cosines
from atomdiff.evaluate.suite import Evaluation


def drift(evaluation: Evaluation) -> Tensor | None:
    """Return how far the images of unrelated prompts are from the base's (prompts, 1), from 0 to 1; lower is better.

    None, if there are no unrelated prompts.
    """
    if not evaluation.base.unrelated:
        return None
    return pixel_differences(evaluation.base.unrelated, evaluation.concept.unrelated)[:, None]


def embedding_drift(evaluation: Evaluation) -> Tensor | None:
    """Return the cosine distance of the images of unrelated prompts from the base's (prompts, 1); lower is better.

    From 0 to 2. It weighs what is shown more than how; `drift` sees any change. None, if there are no unrelated
    prompts.
    """
    if not evaluation.base.unrelated:
        return None
    base, concept = (evaluation.embeddings(name, "unrelated") for name in ("base", "concept"))
    return 1 - cosines(base, concept).diagonal()[:, None]


def pixel_differences(base: Sequence[Image.Image], adapted: Sequence[Image.Image]) -> Tensor:
    """Return the root mean square pixel difference of each pair (n,), from 0 (none) to 1 (black to white).

    Args:
        base: images by the bare base, for prompts that do not name the concept.
        adapted: images with the concept, from the same prompts and seeds in the same order.

    Raises:
        ValueError: there are no images, or their numbers or sizes differ.
    """
    if not base or len(base) != len(adapted):
        raise ValueError(f"found {len(base)} images by the base and {len(adapted)} adapted ones; give pairs")
    return torch.tensor([_rmse(*pair) for pair in zip(base, adapted, strict=True)], dtype=torch.float64)


def _rmse(first: Image.Image, second: Image.Image) -> float:
    if first.size != second.size:
        raise ValueError(f"found images of {first.size} and {second.size} pixels; generate both in one size")
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (first, second))
    return float(np.sqrt(np.mean((one - other) ** 2)))
