"""Results as tables: one for each encoder, since embeddings of different models cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atomdiff.evaluate.estimate import Estimate, estimate
from atomdiff.utils.atomic import write_text

Measured = Mapping[str, Mapping[str, Any]]
"""Subject -> encoder -> what `measure` returns."""


def mean_over_subjects(measured: Measured) -> dict[str, Any]:
    """Return the means over subjects, encoder -> metric -> an `Estimate`, or a dict of these.

    The standard errors are those over subjects; with a single subject, its own over prompts. A value that some subjects
    lack is the mean of the others.
    """
    encoders = dict.fromkeys(name for of_subject in measured.values() for name in of_subject)
    return {name: _mean([of_subject[name] for of_subject in measured.values()]) for name in encoders}


def _mean(found: Sequence[Any]) -> Any:
    found = [each for each in found if each is not None]
    if not found:
        return None
    if isinstance(found[0], dict):
        return {key: _mean([each[key] for each in found]) for key in found[0]}
    if len(found) == 1:
        return found[0]
    return estimate(torch.tensor([[each.mean if isinstance(each, Estimate) else each] for each in found]))


def markdown_table(measured: Measured, means: Mapping[str, Any], encoder: str) -> str:
    """Return the table of an encoder: a row for each subject and, of several, one of the means."""
    rows = {name: dict(_flat(of_subject[encoder])) for name, of_subject in measured.items()}
    if len(rows) > 1:
        rows["**mean**"] = dict(_flat(means[encoder]))
    columns = [c for c in dict(_flat(means[encoder])) if any(row.get(c) is not None for row in rows.values())]
    lines = [["subject", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(path: Path, measured: Measured, means: Mapping[str, Any]) -> None:
    """Write the tables of all encoders as Markdown."""
    titles = {name: f"## {name}\n\n{markdown_table(measured, means, name)}\n" for name in means}
    note = "Values are means ± standard errors, over prompts for a subject and over subjects for the mean.\n"
    write_text(path, "\n".join([note, *titles.values()]))


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for metric, value in found.items():
        name = metric.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{name}: {key.replace('_', ' ')}", each) for key, each in value.items())
        else:
            yield name, value


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
