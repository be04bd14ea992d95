"""Diversity: how much generated images of one prompt differ; a concept that repeats its training images has little.

Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.3 (DIV): there the mean LPIPS distance, here that of embeddings.
"""

from __future__ import annotations

from statistics import fmean

from atomdiff.evaluate.similarity import mean_pairwise_similarity
from atomdiff.evaluate.suite import Evaluation


def diversity(evaluation: Evaluation) -> dict[str, float] | None:
    """Return the mean cosine distance of images of one scene, `base` and `concept`; None with one image a scene.

    From 0, where they are all the same, to 2.
    """
    count = evaluation.suite.images_per_scene
    if count < 2:
        return None
    embeddings = {name: evaluation.encoder.embed(generated.subject) for name, generated in evaluation.both.items()}
    return {
        name: fmean(1 - mean_pairwise_similarity(scene) for scene in embedded.split(count))
        for name, embedded in embeddings.items()
    }
