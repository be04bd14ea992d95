"""Which layers an adapter of atoms changes, learned with it by a score for each layer.

Wallingford et al., "Task Adaptive Parameter Sharing for Multi-Task Learning", arXiv 2203.16708: a layer acts while its
score s is at least a threshold, W' = W + I[s >= threshold] (the change of W); the indicator's gradient is that of s
itself (straight-through); the loss has lambda * mean |s| added, so that layers which earn nothing fall below.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.variants import SCORE_NAME

_WARM_UP = 0.2  # share of a run's steps without the penalty: at first no layer has changed anything yet


def selection_penalty(model: nn.Module, progress: float) -> Tensor | float:
    """The term of the loss that makes layers leave, lambda * mean |s|; 0 where no adapter has scores.

    Args:
        model: what is trained, with one adapter.
        progress: share of the steps done.
    """
    scores = [(score, config) for *_, score, config in _scores(model)]
    if not scores or progress < _WARM_UP:
        return 0.0
    return scores[0][1].select_penalty * torch.cat([score for score, _ in scores]).abs().mean()


def has_scores(model: nn.Module) -> bool:
    """Whether layers are chosen by scores."""
    return any(True for _ in _scores(model))


def has_budget(model: nn.Module) -> bool:
    """Whether an adapter leaves out layers for the size of its file."""
    return any(config.budget is not None for *_, config in _scores(model))


def layer_scores(model: nn.Module, name: str) -> dict[str, float]:
    """Module path -> score, of an adapter with scores."""
    return {path: float(score.detach()) for path, adapter, score, _ in _scores(model) if adapter == name}


@torch.no_grad()
def leave_out(model: nn.Module, name: str, kept: Collection[str]) -> None:
    """Set the scores of all layers but those kept to 0, by which `frozen_scores` knows them from then on."""
    for path, adapter, score, _ in _scores(model):
        if adapter == name and path not in kept:
            score.zero_()


def frozen_scores(model: nn.Module) -> list[nn.Parameter]:
    """The scores of layers that were left out for a budget, which are not trained any more."""
    scores = [score for *_, score, config in _scores(model) if config.budget is not None]
    zeros = (torch.cat([score.detach() for score in scores]) == 0).tolist() if scores else []
    return [score for score, is_zero in zip(scores, zeros, strict=True) if is_zero]


def _scores(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, AtomConfig]]:
    """Module path, adapter, score (1,) and settings of all layers that have a score."""
    for path, layer in atom_layers(model).items():
        for name, score in layer.tensors(SCORE_NAME).items():
            yield path, name, score, layer.settings[name]
