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


def means_of_kinds(measured: Measured, kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the means over all subjects and, of several kinds, over those of each.

    The standard errors are those over subjects; of a single subject they are its own, over prompts. A value that some
    subjects lack is the mean of the others.

    Args:
        measured: what was measured.
        kinds: the kind of each subject.

    Returns:
        `all` or a kind -> encoder -> metric -> an `Estimate`, or a dict of these.
    """
    groups = {"all": [*measured]}
    if len(found := dict.fromkeys(kinds.values())) > 1:
        groups |= {kind: [name for name in measured if kinds[name] == kind] for kind in found}
    encoders = dict.fromkeys(name for of_subject in measured.values() for name in of_subject)
    return {
        kind: {encoder: _mean([measured[name][encoder] for name in names]) for encoder in encoders}
        for kind, names in groups.items()
    }


def _mean(found: Sequence[Any]) -> Any:
    found = [each for each in found if each is not None]
    if not found:
        return None
    if isinstance(found[0], dict):
        return {key: _mean([each[key] for each in found]) for key in found[0]}
    if len(found) == 1:
        return found[0]
    values = [[each.mean if isinstance(each, Estimate) else each] for each in found]
    return estimate(torch.tensor(values, dtype=torch.float64))


def markdown_table(measured: Measured, means: Mapping[str, Mapping[str, Any]], encoder: str) -> str:
    """Return the table of an encoder: a row for each subject and, of several, the means."""
    rows = {name: dict(_flat(of_subject[encoder])) for name, of_subject in measured.items()}
    if len(rows) > 1:
        rows |= {f"**mean of {kind}**": dict(_flat(mean[encoder])) for kind, mean in means.items()}
    columns = dict.fromkeys(key for row in rows.values() for key, value in row.items() if value is not None)
    lines = [["subject", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(path: Path, measured: Measured, means: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the tables of all encoders as Markdown."""
    tables = [f"## {name}\n\n{markdown_table(measured, means, name)}\n" for name in means["all"]]
    note = "Values are means ± standard errors, over prompts for a subject and over subjects for the mean.\n"
    write_text(path, "\n".join([note, *tables]))


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for metric, value in found.items():
        name = metric.replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{name}: {key.replace('_', ' ')}", each) for key, each in value.items())
        else:
            yield name, value


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
