"""Layers that leave a run so that the files of its adapter stay within `select_budget`."""

from typing import cast

from atomdiff.classify.run import Run
from atomdiff.concepts.layer_choice import fitting_layers
from atomdiff.concepts.peft_folder import adapter_bytes
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.tuner.selection import budget_step, has_budget, layer_scores, leave_out


def check_budget(run: Run) -> None:
    """Refuse a budget without room for any layer.

    Raises:
        UserError: It is such a budget.
    """
    if has_budget(layer_scores(run.model, ADAPTER_NAME)):
        _fitting_layers(run)


def keep_to_budget(run: Run, step: int) -> None:
    """After half of the steps, leave out the layers for which there is no room; the others are trained on."""
    if step == budget_step(run.config.max_train_steps):
        scores = layer_scores(run.model, ADAPTER_NAME)
        if has_budget(scores):
            leave_out(scores, _fitting_layers(run))


def _fitting_layers(run: Run) -> list[str]:
    """Return the layers that the adapter would have now: the same on all processes, whose scores are the same."""
    config, tensors = cast(AtomConfig, run.method), peft_tensors(run.model, ADAPTER_NAME)
    scores = {score.path: float(score.parameter.detach()) for score in layer_scores(run.model, ADAPTER_NAME)}

    def size(modules: list[str]) -> int:
        return adapter_bytes(config, tensors, modules)

    return fitting_layers(scores, config.budget, size, files="the adapter's files have")
