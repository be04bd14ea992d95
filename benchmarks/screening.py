"""One change at a time of the recipe, the layers or the adapter: what it does to similarity and drift.

    python -m benchmarks.screening
    python -m benchmarks.screening --table layers
    python -m benchmarks.screening --table adapter --trials 3

`screening_changes.py` has the changes, each with a prediction that was written before the first run. The result file
has what was found beside it: differences from the baseline of the same subjects and seeds, with standard errors over
subjects. It is written anew after every change; a stopped screening goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomdiff.evaluate.protocol import load_protocol
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import own_rate, read_adapter_fields
from benchmarks.result_file import command_line, write_result
from benchmarks.screening_changes import ADAPTER, LAYERS, RECIPE, Change
from benchmarks.trial_figures import (
    Result,
    Summary,
    check_protocols,
    means_by_rate,
    search_rate,
    subject_of,
    summarize,
    summarize_kinds,
    trial_figures,
)
from benchmarks.trial_runner import Runner
from benchmarks.trials import Trial

BASELINE = "baseline"
TABLES = {
    "recipe": ("atoms/default", RECIPE),
    "layers": ("atoms/near_output", LAYERS),
    "adapter": ("atoms/conv", ADAPTER),
}
"""Method of the baseline, and changes."""
_SHOWN = ("gain", "drift", "scenes")


@dataclass(frozen=True)
class ScreeningConfig:
    """Try changes one at a time."""

    table: Literal["recipe", "layers", "adapter"] = "recipe"
    """Which changes: of the training run, of the layers that are adapted, or of the adapter."""
    changes: tuple[str, ...] = ()
    """Names of changes. Default: all of the table."""
    subjects: tuple[str, ...] = ()
    """Subjects to train. Default: all of the protocol."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training runs."""
    trials: int = 1
    """Learning rates that are tried of each change, as in compare_methods.py; 1 is its own one, without a search."""
    max_drift: float = 0.1
    """Highest mean drift at which a learning rate can be the best."""
    processes: int = 1
    """Training runs at a time."""
    retry_failed: bool = False
    """Run again what has failed."""
    run: str = "configs/demo.yaml"
    """Settings of the training runs and of sampling."""
    tuning_dir: str = "samples/tuning_subjects"
    """A folder of photos for each subject."""
    protocol: str = "toybox_tuning"
    """Protocol of the evaluation."""
    work_dir: str = "out/screening"
    """Folder of the runs; finished ones are not repeated."""
    output: str | None = None
    """The result file. Default: benchmarks/results/screening_TABLE.json."""


def run_change(
    config: ScreeningConfig, name: str, change: Change, runner: Runner
) -> tuple[dict[str, Any], Sequence[Result]]:
    """Run a change on all subjects.

    Returns:
        Its best learning rate and the means at each, for the result file; and the results at the best. If trials fail
        at all rates, those are the first one's.
    """
    method, _ = TABLES[config.table]
    folder = Path(config.work_dir) / config.table / name.replace(" ", "-")
    results: dict[float, Sequence[Result]] = {}

    def measure(rate: float) -> Summary | None:
        trials = [
            Trial(
                str(folder / f"{rate:g}" / f"{subject}-seed{seed}"),
                str(Path(config.tuning_dir) / subject),
                {**read_adapter_fields(method), **change.adapter},
                {"learning_rate": rate, "seed": seed, **change.options},
                (config.protocol,),
                config.run,
                str(Path(config.work_dir) / "shared"),
            )
            for subject in config.subjects or load_protocol(config.protocol).subjects
            for seed in config.seeds
        ]
        results[rate] = runner.run(trials)
        return None if _failures(results[rate]) else summarize_kinds(results[rate])["all"]

    best, _, found = search_rate(own_rate(method) * change.rate, config.trials, config.max_drift, measure)
    rate = next(iter(results)) if best is None else best
    return {"learning_rate": rate, "search": means_by_rate(found)}, results[rate]


def describe_change(
    change: Change | None, searched: Mapping[str, Any], results: Sequence[Result], baseline: Sequence[Result]
) -> dict[str, Any]:
    """Return what was predicted of a change and what was found, for the result file; None is the baseline.

    Args:
        change: the change.
        searched: its learning rate, and what was found at each.
        results: its trials.
        baseline: those of the baseline, in the same order.
    """
    described = dict(searched)
    if change is not None:
        predicted = {"gain": change.gain, "drift": change.drift, "why": change.why}
        described |= {"predicted": predicted, "options": dict(change.options), "adapter": dict(change.adapter)}
    if failures := _failures(results):
        return described | {"failed": failures}
    described |= {name: results[0][name] for name in ("parameters", "bytes")}
    described["figures"] = summarize_kinds(results)["all"]
    if change is not None:
        described["differences"] = differences(results, baseline)
    return described


def differences(results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, Any]:
    """Return the mean differences from the baseline's figures, with standard errors over subjects."""
    by_subject: dict[str, list[Mapping[str, float]]] = {}
    for result, other in zip(results, baseline, strict=True):
        ours, theirs = trial_figures(result), trial_figures(other)
        difference = {name: value - theirs[name] for name, value in ours.items()}
        by_subject.setdefault(subject_of(result), []).append(difference)
    return summarize(by_subject)


def make_table(changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return predicted and found differences as a Markdown table; of the baseline its own figures."""
    lines = ["| change | gain: predicted | found | drift: predicted | found | scenes | parameters |", "|---" * 7 + "|"]
    for name, found in changes.items():
        if "failed" in found:
            lines.append(f"| {name} | failed: {found['failed'][0]['message']} |" + " |" * 5)
            continue
        shown = found.get("differences", found["figures"])
        sign = "+" if "differences" in found else ""
        cells = [_cell(shown[each], sign) for each in _SHOWN]
        predicted = [f"{found['predicted'][each]:+.3f}" if sign else "" for each in ("gain", "drift")]
        row = [name, predicted[0], cells[0], predicted[1], cells[1], cells[2], f"{found['parameters']:,}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], sign: str) -> str:
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
    return f"{found['mean']:{sign}.3f}{error}"


def _failures(results: Sequence[Result]) -> list[dict[str, str]]:
    failed = [each for each in results if each["status"] == "failed"]
    return [{"subject": subject_of(each), "message": each["message"]} for each in failed]


def main(config: ScreeningConfig) -> None:
    """Run the baseline and the changes, and write the result file after each."""
    quiet_libraries()
    method, table = TABLES[config.table]
    if unknown := [name for name in config.changes if name not in table]:
        raise UserError(f"changes: found {unknown[0]!r}; expected some of {', '.join(table)}")
    check_protocols((config.protocol,), config.subjects, Path(config.tuning_dir))
    runner = Runner(config.processes, config.retry_failed)
    searched, baseline = run_change(config, BASELINE, Change("", 0.0, 0.0), runner)
    if failures := _failures(baseline):
        raise UserError(
            f"the baseline failed: {failures[0]['message']}; expected it to succeed, or no difference can be"
        )
    changes = {BASELINE: describe_change(None, searched, baseline, baseline)}
    output = config.output or f"benchmarks/results/screening_{config.table}.json"
    command = command_line("screening", config, ("work_dir", "output", "processes", "retry_failed"))
    for name in config.changes or table:
        searched, results = run_change(config, name, table[name], runner)
        changes[name] = describe_change(table[name], searched, results, baseline)
        shown = {each: changes[each].get("differences", {}).get("gain", {}).get("mean") for each in changes}
        write_result(output, command, shown, baseline=method, changes=changes)
    print(make_table(changes))


if __name__ == "__main__":
    main(parse_config(ScreeningConfig, prog="python -m benchmarks.screening"))
