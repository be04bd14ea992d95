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

from atomdiff.atoms.variants import SCORE_NAME, SCORE_THRESHOLD
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.config import AtomConfig
from atomdiff.utils.errors import UserError

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


def acting_layers(scores: Iterable[LayerScore]) -> list[str]:
    """Paths of the layers whose score is at least the threshold."""
    return [score.path for score in scores if float(score.parameter.detach()) >= SCORE_THRESHOLD]


def selection_penalty(scores: Sequence[LayerScore], progress: float) -> Tensor | float:
    """The term of the loss that makes layers leave, mean lambda * |s|; 0 without scores.

    Args:
        scores: of all layers.
        progress: share of the steps done.
    """
    if not scores or progress < _WARM_UP:
        return 0.0
    return torch.cat([score.config.select_penalty * score.parameter for score in scores]).abs().mean()


def budget_step(num_steps: int) -> int:
    """The step of a run after which layers leave for the size of the file: that of its half."""
    return max(1, num_steps // 2)


def first_lasting_step(scores: Sequence[LayerScore], num_steps: int) -> int:
    """The first step of a run after which no layer leaves for the size of the file any more."""
    return budget_step(num_steps) if has_budget(scores) else 1


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
    """Whether layers leave for the size of what is written."""
    return any(score.config.budget is not None for score in scores)


def file_budget(configs: Iterable[AtomConfig]) -> int | None:
    """Bytes that one file may have with the layers of several adapters, such as those of a concept's components.

    Raises:
        UserError: those whose layers are chosen by scores have different budgets.
    """
    budgets = list(dict.fromkeys(config.budget for config in configs if config.select == "adaptive"))
    if len(budgets) > 1:
        found = " and ".join("none" if budget is None else f"{budget:,} bytes" for budget in budgets)
        raise UserError(
            f"select_budget: found {found} in the adapters of one concept, but its file has one size: give all of them "
            "the same, or choose the layers of one alone"
        )
    return budgets[0] if budgets else None
