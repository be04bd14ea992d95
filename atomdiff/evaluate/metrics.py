"""The metrics by name: to add one, write its file and enter it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from atomdiff.evaluate.diversity import diversity
from atomdiff.evaluate.drift import drift
from atomdiff.evaluate.scene_accuracy import scene_accuracy
from atomdiff.evaluate.similarity import similarity
from atomdiff.evaluate.suite import Evaluation

Metric = Callable[[Evaluation], Any]
"""Returns a number, None where it is not defined, or a dict of such: most often of `base` and `concept`."""

METRICS: dict[str, Metric] = {
    "similarity": similarity,
    "scene_accuracy": scene_accuracy,
    "diversity": diversity,
    "drift": drift,
}


def score(evaluation: Evaluation, metrics: Mapping[str, Metric] = METRICS) -> dict[str, Any]:
    """Return the values of all metrics by name, rounded to 4 digits after the point."""
    return {name: _rounded(metric(evaluation)) for name, metric in metrics.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value if value is None else round(value, 4)
