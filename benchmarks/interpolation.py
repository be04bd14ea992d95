"""Weights between those of a base and of a copy tuned from it, and the curve that they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return W0 + a (W - W0) for every tensor of `start`; 0 and 1 give the two to the bit, and counters stay.

    As in PAINT (Ilharco et al., "Patching open-vocabulary models by interpolating weights", arXiv 2208.05592).

    Args:
        start: W0 by path.
        end: W by path; what else it has is left out.
        alpha: a.
    """
    return {
        path: torch.lerp(tensor, end[path], alpha) if tensor.is_floating_point() else tensor
        for path, tensor in start.items()
    }


def similarity_at(curve: Sequence[Mapping[str, float]], drift: float) -> float | None:
    """Return the similarity at which a curve first has a drift, on straight lines; None: it has none such."""
    for first, second in pairwise(curve):
        low, high = first["drift"], second["drift"]
        if min(low, high) <= drift <= max(low, high):
            share = (drift - low) / (high - low) if high != low else 0.0
            return first["similarity"] + share * (second["similarity"] - first["similarity"])
    return None
