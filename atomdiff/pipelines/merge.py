"""Write the active concepts of a pipeline into its weights, and take them out again to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atomdiff.pipelines.loaded_concepts import refresh
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.tuner import checks, merging


def merge(pipe: Any) -> None:
    """Write the active concepts with their weights into the base weights: images then cost what the base's cost.

    Untouched weights are kept aside, so that `restore` is exact: adapted layers take twice their memory meanwhile.
    Later changes of weights or of active concepts have no effect until the next `merge` or `restore`; `set_active` does
    all at once.
    """
    _change_models(pipe, checks.check_writable, merging.merge)


def restore(pipe: Any) -> None:
    """Undo `merge` and `set_active`: every weight has the bits it had; concepts stay loaded, and act unmerged."""
    _change_models(pipe, checks.check_restorable, merging.restore)


def _change_models(pipe: Any, check: Callable[[Any], None], change: Callable[[Any], None]) -> None:
    """Change all models of a pipeline, or none if one of them cannot be."""
    with locked(pipe):
        refresh(pipe)
        models = pipeline_models(pipe).values()
        for model in models:
            check(model)
        stop_schedule(pipe)
        for model in models:
            change(model)


def stop_schedule(pipe: Any) -> None:
    """Stop writing weights before denoising steps; those of the last one stay."""
    for model in pipeline_models(pipe).values():
        if (schedule := vars(model).pop("_atomdiff_schedule", None)) is not None:
            schedule.remove()
