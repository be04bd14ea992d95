"""Diversity: how much generated images of one prompt differ; a concept that repeats its training images has little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atomdiff.evaluate.similarity import cosines, mean_pairwise_similarity
from atomdiff.evaluate.suite import Evaluation


def diversity(evaluation: Evaluation) -> dict[str, Tensor] | None:
    """Return the mean cosine distance of the images of each prompt, `base` and `concept`; higher is more diverse.

    Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.3 (DIV): there the mean LPIPS distance.

    Returns:
        Values (prompts, 1), from 0, where all images of a prompt are the same, to 2; None with one image a prompt.
    """
    return _of_each_prompt(evaluation, lambda embeddings: 1 - mean_pairwise_similarity(embeddings))


def vendi(evaluation: Evaluation) -> dict[str, Tensor] | None:
    """Return the Vendi score of the images of each prompt, `base` and `concept`; higher is more diverse.

    Returns:
        Values (prompts, 1), from 1 to the number of images of a prompt; None with one image a prompt.
    """
    return _of_each_prompt(evaluation, vendi_score)


def vendi_score(embeddings: Tensor) -> float:
    """Return how many images with nothing in common a set of images (n, e) is worth, from 1 to n.

    The exponential of the entropy of the eigenvalues of K / n, K the cosines of all pairs: Friedman and Dieng, "The
    Vendi Score: A Diversity Evaluation Metric for Machine Learning", arXiv 2210.02410, eq. 2.
    """
    shares = torch.linalg.eigvalsh(cosines(embeddings, embeddings) / len(embeddings)).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())


def _of_each_prompt(evaluation: Evaluation, measure: Callable[[Tensor], float]) -> dict[str, Tensor] | None:
    count = evaluation.suite.images_per_prompt
    if count < 2:
        return None
    return {
        name: torch.tensor([[measure(each)] for each in evaluation.embeddings(name, "subject").split(count)])
        for name in ("base", "concept")
    }
