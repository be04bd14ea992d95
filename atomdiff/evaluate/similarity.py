"""Subject fidelity: how much generated images look like the subject.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv 2208.12242,
section 4.2: there with the embeddings of CLIP (CLIP-I) or DINO ViT-S/16 (DINO), here with any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atomdiff.evaluate.suite import Evaluation

LEAST_WAY = 1e-3
"""How much more alike the references must be than the base's images are to them, for a share of that to count."""


_LOOKS = {"color", "pattern"}  # kinds of labels: who asks for another one wants no image like the references


def similarity(evaluation: Evaluation) -> dict[str, Tensor | float | None] | None:
    """Return how similar the subject's images are to the references; higher is better.

    None, if every prompt asks for another color or pattern.

    Returns:
        `base`, `concept`: mean cosine similarity of each image to the references (prompts, images). `real`: that of the
        references to each other. `normalized_gain`: the concept's share of the way from base to real (prompts, images).
        A single reference leaves these two None; a way shorter than `LEAST_WAY`, or none at all, the gain.
    """
    labels = evaluation.suite.labels
    if labels and all(_LOOKS & each.keys() for each in labels):
        return None
    references = evaluation.reference_embeddings
    base, concept = (
        evaluation.by_prompt(similarities(evaluation.embeddings(name, "subject"), references))
        for name in ("base", "concept")
    )
    real = mean_pairwise_similarity(references) if len(references) > 1 else None
    way = 0.0 if real is None else real - float(base.mean())
    gain = (concept - base) / way if way >= LEAST_WAY else None
    return {"base": base, "concept": concept, "real": real, "normalized_gain": gain}


def prior_similarity(evaluation: Evaluation) -> dict[str, Tensor] | None:
    """Return how similar images of the class are to the references, `base` and `concept`; None without such images.

    The class is named without the trigger word, so a concept's value above the base's tells that it has taken the class
    over: lower is better (DreamBooth's prior preservation, PRES, section 4.3).

    Returns:
        The mean cosine similarity of each image to the references (prompts, images).
    """
    if not evaluation.base.prior:
        return None
    return {
        name: evaluation.by_prompt(similarities(evaluation.embeddings(name, "prior"), evaluation.reference_embeddings))
        for name in ("base", "concept")
    }


def similarities(generated: Tensor, references: Tensor) -> Tensor:
    """Return the mean cosine similarity of each generated image to all references (n,) in float64, from -1 to 1.

    Args:
        generated: embeddings (n, e), of any length.
        references: embeddings (m, e) of images of the subject, best ones that were not trained on.

    Raises:
        ValueError: a set is empty, or the sizes of the embeddings differ.
    """
    _check(generated, least=1)
    _check(references, least=1)
    if generated.shape[1] != references.shape[1]:
        raise ValueError(f"found embeddings of sizes {generated.shape[1]} and {references.shape[1]}; embed both alike")
    return cosines(generated, references).mean(1)


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
    return float(cosines(embeddings, embeddings)[others].mean())


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines (n, m) in float64 of embeddings (n, e) and (m, e), in spite of rounding none above 1."""
    return (normalize(first.double(), dim=1) @ normalize(second.double(), dim=1).T).clamp(-1, 1)


def _check(embeddings: Tensor, least: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) < least:
        raise ValueError(
            f"found embeddings of shape {tuple(embeddings.shape)}; expected (n, e) with n at least {least}"
        )
