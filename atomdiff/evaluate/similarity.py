"""Subject fidelity: how much generated images look like the subject.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv 2208.12242,
section 4.2: there with the embeddings of CLIP (CLIP-I) or DINO ViT-S/16 (DINO), here with any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atomdiff.evaluate.suite import Evaluation


def similarity(evaluation: Evaluation) -> dict[str, float | None]:
    """Return how similar the subject's images are to the references.

    Returns:
        `base`, `concept`: mean cosine similarity to the references. `real`: that of the references to each other.
        `normalized_gain`: the concept's share of the way from base to real. A single reference leaves these two None.
    """
    references = evaluation.encoder.embed(evaluation.references)
    base = mean_similarity(evaluation.encoder.embed(evaluation.base.subject), references)
    concept = mean_similarity(evaluation.encoder.embed(evaluation.concept.subject), references)
    real = mean_pairwise_similarity(references) if len(references) > 1 else None
    gain = None if real is None or real == base else (concept - base) / (real - base)
    return {"base": base, "concept": concept, "real": real, "normalized_gain": gain}


def mean_similarity(generated: Tensor, references: Tensor) -> float:
    """Return the mean cosine similarity of all pairs of a generated and a reference image.

    Args:
        generated: embeddings (n, e), of any length.
        references: embeddings (m, e) of images of the subject, best ones that were not trained on.

    Returns:
        From -1 to 1; for the subject itself about `mean_pairwise_similarity(references)`.

    Raises:
        ValueError: a set is empty, or the sizes of the embeddings differ.
    """
    _check(generated, least=1)
    _check(references, least=1)
    if generated.shape[1] != references.shape[1]:
        raise ValueError(f"found embeddings of sizes {generated.shape[1]} and {references.shape[1]}; embed both alike")
    return float(_cosines(generated, references).mean())


def mean_pairwise_similarity(embeddings: Tensor) -> float:
    """Return the mean cosine similarity of all pairs of different images of one set, from -1 to 1.

    For photos of one subject it is what DreamBooth's table 1 calls "real images": as alike as such photos are.

    Args:
        embeddings: (n, e), of any length, n at least 2.

    Raises:
        ValueError: there are fewer than two.
    """
    _check(embeddings, least=2)
    others = ~torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    return float(_cosines(embeddings, embeddings)[others].mean())


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return cosines (n, m) in float64."""
    return normalize(first.double(), dim=1) @ normalize(second.double(), dim=1).T


def _check(embeddings: Tensor, least: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) < least:
        raise ValueError(
            f"found embeddings of shape {tuple(embeddings.shape)}; expected (n, e) with n at least {least}"
        )
