"""Which layers an adapter of atoms changes, learned with it by a score for each layer.

Wallingford et al., "Task Adaptive Parameter Sharing for Multi-Task Learning", arXiv 2203.16708: a layer acts while its
score s is at least a threshold, W' = W + I[s >= threshold] (the change of W); the indicator's gradient is that of s
itself (straight-through); the loss has lambda * mean |s| added, so that layers which earn nothing fall below.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atomdiff.atoms.variants import SCORE_NAME
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.config import AtomConfig

_WARM_UP = 0.2  # share of a run's steps without the penalty: at first no layer has changed anything yet


@dataclass(frozen=True)
class LayerScore:
    """The score of a layer."""

    path: str
    """Path of the adapted module."""
    parameter: nn.Parameter
    """The score s (1,)."""
    config: AtomConfig
    """Settings of the adapter."""


def layer_scores(model: nn.Module, name: str) -> list[LayerScore]:
    """The scores of all layers of an adapter; none where its layers are not chosen by scores."""
    scores = {path: (layer, layer.tensors(SCORE_NAME)) for path, layer in atom_layers(model).items()}
    return [LayerScore(path, of[name], layer.settings[name]) for path, (layer, of) in scores.items() if name in of]


def selection_penalty(scores: Sequence[LayerScore], progress: float) -> Tensor | float:
    """The term of the loss that makes layers leave, lambda * mean |s|; 0 without scores.

    Args:
        scores: of all layers.
        progress: share of the steps done.
    """
    if not scores or progress < _WARM_UP:
        return 0.0
    return scores[0].config.select_penalty * torch.cat([score.parameter for score in scores]).abs().mean()


@torch.no_grad()
def leave_out(scores: Iterable[LayerScore], kept: Collection[str]) -> None:
    """Set the scores of all layers but those kept, by path, to 0; `frozen_scores` knows them by that from then on."""
    for score in scores:
        if score.path not in kept:
            score.parameter.zero_()


def frozen_scores(scores: Sequence[LayerScore]) -> list[nn.Parameter]:
    """The scores of layers that were left out for a budget, which are not trained any more."""
    if not has_budget(scores):
        return []
    zeros = (torch.cat([score.parameter.detach() for score in scores]) == 0).tolist()
    return [score.parameter for score, is_zero in zip(scores, zeros, strict=True) if is_zero]


def has_budget(scores: Sequence[LayerScore]) -> bool:
    """Whether layers leave for the size of the file."""
    return any(score.config.budget is not None for score in scores)
