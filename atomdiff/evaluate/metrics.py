"""The metrics by name: to add one, write its file and enter it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from atomdiff.evaluate.diversity import diversity, vendi
from atomdiff.evaluate.drift import drift, embedding_drift
from atomdiff.evaluate.estimate import Estimate, estimate
from atomdiff.evaluate.label_accuracy import LABEL_KINDS, label_accuracy
from atomdiff.evaluate.prompt_match import prompt_match
from atomdiff.evaluate.similarity import prior_similarity, similarity
from atomdiff.evaluate.suite import Evaluation

Metric = Callable[[Evaluation], Any]
"""Returns values (prompts, images), a number, None where it is not defined, or a dict of such: most often of `base` and
`concept`."""

METRICS: dict[str, Metric] = {
    "similarity": similarity,
    "prompt_match": prompt_match,
    **{f"{kind}_accuracy": label_accuracy(kind) for kind in LABEL_KINDS},
    "prior_similarity": prior_similarity,
    "diversity": diversity,
    "vendi": vendi,
    "drift": drift,
    "embedding_drift": embedding_drift,
}
_DIGITS = 4  # after the point


def measure(evaluation: Evaluation, metrics: Mapping[str, Metric] = METRICS) -> dict[str, Any]:
    """Return the values of all metrics by name, with standard errors.

    Returns:
        An `Estimate`, a number, None, or a dict of these for each metric; see its function.
    """
    return {name: _map(metric(evaluation), _estimated) for name, metric in metrics.items()}


def score(evaluation: Evaluation, metrics: Mapping[str, Metric] = METRICS) -> dict[str, Any]:
    """Return the means of all metrics that are defined, by name, rounded to 4 digits after the point."""
    measured = {name: _map(value, _mean) for name, value in measure(evaluation, metrics).items()}
    return {name: value for name, value in measured.items() if value is not None}


def as_json(measured: Any) -> Any:
    """Return what `measure` returns as JSON has it, rounded."""

    def plain(value: Any) -> Any:
        return _map(asdict(value), _mean) if isinstance(value, Estimate) else _mean(value)

    return _map(measured, plain)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    return {name: _map(each, function) for name, each in value.items()} if isinstance(value, dict) else function(value)


def _estimated(value: Any) -> Any:
    return estimate(value) if isinstance(value, Tensor) else value


def _mean(value: Any) -> Any:
    value = value.mean if isinstance(value, Estimate) else value
    return round(value, _DIGITS) if isinstance(value, float) else value
