"""Averages of runs of one start: one subject learned with several seeds, and the means of two and of three of them.

    python -m benchmarks.averages

The runs are those of `compare_methods.py` with `atoms/default`, at the learning rate of its result file; what is
missing is trained. Every mean of so many of a subject's runs is written as `atomdiff average` writes it, and evaluated
as a run is: the same prompts, from the same seeds. *over one* is what means have more than single runs of the same
subject, with standard errors over the subjects. *spread* is the standard deviation over a subject's seeds, or over its
means of so many, as a mean over the subjects; means of two of three runs share runs, so their spread is smaller than
that of independent ones (by a factor of .71 at 3 seeds, if errors are independent). Costs: the seconds of training that
a mean needs, those of `average` itself, and the bytes of the file.

Expected before the first run: single runs of a subject are close (a spread of .02 in the gain), and as all have one
start, no mean is worse than they are. A mean of two has .02 more gain and .005 less drift than a
single run, one of three .03 and .007; the token embeddings, which are averaged too, gain nothing. The spread of means
of two is half of that of single runs. Files are as large as one, and averaging takes less than a second; the training
takes twice and three times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import ComparedConcepts
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import check_protocols, summarize, trial_figures
from benchmarks.trial_runner import run_concepts
from benchmarks.trials import Trial, concept_path, evaluate_concept

_SPREAD = ("similarity", "gain", "drift")
_DIGITS = 4
Figures = Mapping[str, float]


@dataclass(frozen=True)
class AveragesConfig(ComparedConcepts):
    """Average runs that differ in their seed."""

    method: str = "atoms/default"
    """Folder under configs/experiments, of a method of atoms."""
    subjects: tuple[str, ...] = ("mug", "cat", "umbrella", "mushroom")
    """Subjects."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training runs."""
    counts: tuple[int, ...] = (2, 3)
    """Runs in a mean; all combinations of so many are evaluated."""
    output: str = "benchmarks/results/averages.json"
    """The result file."""


def average(trials: Sequence[Trial], folder: Path) -> tuple[Path, float]:
    """Write the mean of the concepts of runs; return the file, named like its subject, and the seconds."""
    from atomdiff.concepts.average import AverageConfig, average_files

    folder.mkdir(parents=True, exist_ok=True)
    sources = [concept_path(trial) for trial in trials]
    output = folder / sources[0].name
    started = time.perf_counter()
    average_files(AverageConfig(files=tuple(map(str, sources)), output=str(output)))
    return output, time.perf_counter() - started


def measure_average(trials: Sequence[Trial], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of the mean of some runs of a subject, with its costs."""
    first = trials[0]
    seeds = "+".join(str(trial.options["seed"]) for trial in trials)
    mean = replace(first, folder=str(Path(first.folder).with_name(f"{Path(first.folder).name}-mean-of-{seeds}")))
    file, seconds = average(trials, Path(mean.folder) / "concept")
    print(f"{file}: evaluated", flush=True)
    evaluated = {"trial": {"photos": mean.photos}, **evaluate_concept(mean, file)}
    training = sum(result["train_seconds"] for result in results)
    return {
        **trial_figures(evaluated),
        "bytes": file.stat().st_size,
        "average_seconds": seconds,
        "train_seconds": training,
    }


def measure_subject(
    trials: Sequence[Trial], results: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[int, list[dict[str, float]]]:
    """Return the figures of single runs and of all means of a subject, by the number of runs."""
    costs = ("bytes", "train_seconds")
    found = {1: [{**trial_figures(each), **{name: each[name] for name in costs}} for each in results]}
    for count in counts:
        chosen = zip(combinations(trials, count), combinations(results, count), strict=True)
        found[count] = [measure_average(*each) for each in chosen]
    return found


def over_one(by_subject: Mapping[str, Mapping[int, Sequence[Figures]]], count: int) -> dict[str, Any]:
    """Return `summarize` of what means of so many runs have more than single runs of their subject."""
    more = {}
    for subject, found in by_subject.items():
        single = {name: statistics.mean(each[name] for each in found[1]) for name in found[1][0]}
        more[subject] = [{name: each[name] - value for name, value in single.items()} for each in found[count]]
    return summarize(more)


def spread(by_subject: Mapping[str, Mapping[int, Sequence[Figures]]], count: int) -> dict[str, float]:
    """Return mean standard deviations over the runs of a subject, or over its means of so many."""
    return {
        name: round(
            statistics.mean(statistics.stdev(each[name] for each in found[count]) for found in by_subject.values()),
            _DIGITS,
        )
        for name in _SPREAD
    }


def describe(by_subject: Mapping[str, Mapping[int, Sequence[Figures]]], count: int) -> dict[str, Any]:
    """Return the figures of single runs, or of means of so many."""
    described: dict[str, Any] = {"figures": summarize({name: found[count] for name, found in by_subject.items()})}
    if count > 1:
        described["over one"] = over_one(by_subject, count)
    if all(len(found[count]) > 1 for found in by_subject.values()):
        described["spread"] = spread(by_subject, count)
    return described


def check(config: AveragesConfig) -> None:
    """Check that there are as many runs as a mean has, and what else the runs need.

    Raises:
        UserError: there are not.
    """
    if wrong := [count for count in config.counts if not 2 <= count <= len(config.seeds)]:
        raise UserError(f"counts: found {wrong[0]}; expected 2 to {len(config.seeds)}, the number of seeds")
    check_protocols(config.protocols, config.subjects, Path(config.subjects_dir))


def main(config: AveragesConfig) -> None:
    """Train what is missing, average, evaluate, and write the result file."""
    quiet_libraries()
    check(config)
    trials = {
        subject: [config.trial(config.method, subject, seed) for seed in config.seeds] for subject in config.subjects
    }
    results = iter(run_concepts([trial for each in trials.values() for trial in each], config.processes))
    by_subject = {
        subject: measure_subject(each, [*islice(results, len(each))], config.counts) for subject, each in trials.items()
    }
    figures = {str(count): describe(by_subject, count) for count in (1, *config.counts)}
    runs = [
        {"subject": subject, "seeds": seeds, **each}
        for subject, found in by_subject.items()
        for count, of_count in found.items()
        for seeds, each in zip(combinations(config.seeds, count), of_count, strict=True)
    ]
    command = command_line("averages", config, ("work_dir", "processes", "output"))
    write_result(config.output, command, figures, runs=runs)


if __name__ == "__main__":
    main(parse_config(AveragesConfig, prog="python -m benchmarks.averages"))
