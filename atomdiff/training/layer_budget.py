"""Layers that leave a run so that its concept file stays within `select_budget`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.save import build_concept
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.training.saving import complete_pipeline, concept_metadata
from atomdiff.tuner.selection import budget_step, frozen_scores, has_budget, layer_scores, leave_out

if TYPE_CHECKING:
    from atomdiff.training.run import Run

_LONG_LOSS = 1 / 3e5  # about the longest that a file's metadata may have


def check_budget(run: Run, state: Mapping[str, Any] | None = None) -> None:
    """Refuse a budget without room for any layer.

    A run that resumes with fewer steps than it was begun with, and so has passed their half unnoticed, keeps to the
    budget from now on.

    Args:
        run: The run.
        state: What it goes on from; None if it starts anew.

    Raises:
        UserError: It is such a budget.
    """
    if not has_budget(run.model.layer_scores):
        return
    kept = _fitting_layers(run)
    if not state:
        return
    planned = state["config"]["max_train_steps"]
    if budget_step(run.config.max_train_steps) <= state["step"] < budget_step(planned):
        _leave_out_others(run, kept)


def keep_to_budget(run: Run, step: int) -> None:
    """After half of the steps, leave out the layers for which the file has no room; the others are trained on."""
    if step == budget_step(run.config.max_train_steps) and has_budget(run.model.layer_scores):
        _leave_out_others(run, _fitting_layers(run))


def _leave_out_others(run: Run, kept: list[str]) -> None:
    """Leave layers out; also of the moving average, in which they would go on to act for a while."""
    for component, model in pipeline_models(run.pipe).items():
        leave_out(
            layer_scores(model, ADAPTER_NAME),
            {name.partition(".")[2] for name in kept if name.startswith(f"{component}.")},
        )
    if run.ema is not None:
        frozen = {id(parameter) for parameter in frozen_scores(run.model.layer_scores)}
        for parameter, average in zip(run.trainable.values(), run.ema.shadow_params, strict=True):
            if id(parameter) in frozen:
                average.zero_()


def _fitting_layers(run: Run) -> list[str]:
    """Return the layers that a file would have now: the same on all processes, whose scores are the same."""
    config = run.config
    metadata = concept_metadata(run, config.max_train_steps, _LONG_LOSS, config.snapshot())
    with complete_pipeline(run):
        return list(build_concept(run.pipe, Path(config.name).name, ADAPTER_NAME, **metadata).layers)
