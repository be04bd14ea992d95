"""Diversity: how much generated pictures of one prompt differ; a concept that repeats its training photos has little.

Ruiz et al., "DreamBooth", arXiv 2208.12242, section 4.3 (DIV): there the mean LPIPS distance, here that of embeddings.
"""

from torch import Tensor

from atomdiff.evaluate.fidelity import mean_pairwise_similarity


def diversity(generated: Tensor) -> float:
    """Return 1 minus the mean cosine similarity of all pairs of different pictures: from 0 (all the same) to 2.

    Args:
        generated: embeddings (n, e) of pictures of one prompt from different seeds, n at least 2.

    Raises:
        ValueError: there are fewer than two.
    """
    return 1 - mean_pairwise_similarity(generated)
