"""Diversity: how much generated images of one prompt differ; a concept that repeats its training images has little.

Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.3 (DIV): there the mean LPIPS distance, here that of embeddings.
"""

from __future__ import annotations

from statistics import fmean

from torch import Tensor

from atomdiff.evaluate.similarity import mean_pairwise_similarity
from atomdiff.evaluate.suite import Evaluation


def diversity(evaluation: Evaluation) -> dict[str, float] | None:
    """Return the mean distance of images of one scene, `base` and `concept`; None with one image a scene."""
    count = evaluation.suite.images_per_scene
    if count < 2:
        return None
    return {
        name: fmean(mean_distance(group) for group in evaluation.encoder.embed(generated.subject).split(count))
        for name, generated in (("base", evaluation.base), ("concept", evaluation.concept))
    }


def mean_distance(generated: Tensor) -> float:
    """Return 1 minus the mean cosine similarity of all pairs of different images: from 0 (all the same) to 2.

    Args:
        generated: embeddings (n, e) of images of one prompt from different seeds, n at least 2.

    Raises:
        ValueError: there are fewer than two.
    """
    return 1 - mean_pairwise_similarity(generated)
