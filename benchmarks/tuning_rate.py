"""Trials an hour: `atomdiff tune`, whose trials share one process and base, beside a process of `atomdiff train` each.

    python -m benchmarks.tuning_rate

Both train the demo's settings on the same images for the same number of steps, with learning rates close to each other,
and measure the validation loss at the same steps. Too few trials are run for one to be pruned. A search ends with its
table and plots; `atomdiff train` saves its concept and report, which a trial does not, and finds images encoded by the
first of its processes. Rounds take turns in which of the two comes first; figures are medians over rounds, and the
wall times of whole processes, imports included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from atomdiff.utils.options import parse_config
from benchmarks.result_file import command_line, write_result

_SPACE = "learning_rate: {low: 0.9e-3, high: 1.1e-3, log: true}\n"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    steps: tuple[int, ...] = (40,)
    """Steps of a trial; both are measured for each of these numbers."""
    num_trials: int = 3
    """Trials of a search, at most three: from the fourth on one may be pruned."""
    rounds: int = 3
    """Searches, and times as many runs of `atomdiff train`."""
    config: str = "configs/demo.yaml"
    """Settings of all runs."""
    instance_data_dir: str = "samples/subjects/robot"
    """Images of the subject."""
    class_name: str = "robot"
    """What they show."""
    note: str = ""
    """What else is to be known, such as what the machine did besides."""
    output: str = "benchmarks/results/tuning_rate.json"
    """The result file."""


def options(config: BenchmarkConfig, steps: int) -> list[str]:
    """Return the options that all runs share."""
    images = ["--instance_data_dir", config.instance_data_dir, "--class_name", config.class_name]
    length = ["--max_train_steps", str(steps), "--lr_warmup_steps", "0", "--validation_loss_steps", str(steps // 4)]
    held_out = ["--validation_split", "0.2", "--checkpointing_steps", "0", "--report_to", "none"]
    return ["--config", config.config, *images, *length, *held_out, "--validation_steps", "0"]


def seconds(*arguments: str) -> float:
    """Return the wall time of a process of atomdiff."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "atomdiff", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def search(config: BenchmarkConfig, steps: int, folder: Path) -> float:
    """Return the seconds of a search."""
    space = folder / "space.yaml"
    space.write_text(_SPACE)
    trials = ["--search_space", str(space), "--num_trials", str(config.num_trials), "--max_base_drift", "none"]
    return seconds("tune", *options(config, steps), *trials, "--output_dir", str(folder / "tune"))


def separate_runs(config: BenchmarkConfig, steps: int, folder: Path) -> float:
    """Return the seconds of as many runs of `atomdiff train`, with a cache that they share."""
    total = 0.0
    for number in range(config.num_trials):
        output = ["--output_dir", str(folder / str(number)), "--cache_dir", str(folder / "cache")]
        rate = ["--learning_rate", f"{1e-3 * (0.9 + 0.1 * number):g}"]
        total += seconds("train", *options(config, steps), *rate, *output)
    return total


def measure(config: BenchmarkConfig, steps: int) -> dict[str, float]:
    """Return trials an hour of both ways, and their ratio: medians over rounds."""
    ways = {"tune": search, "train": separate_runs}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(config.rounds):
        for name in sorted(ways, reverse=number % 2 == 1):
            with TemporaryDirectory() as folder:
                rates[name].append(3600 * config.num_trials / ways[name](config, steps, Path(folder)))
            print(f"{steps} steps, round {number}: {name} {rates[name][-1]:.1f} trials an hour", flush=True)
    ratios = [tune / train for tune, train in zip(rates["tune"], rates["train"], strict=True)]
    figures = {f"{name}_trials_an_hour": statistics.median(rates[name]) for name in ways}
    figures |= {"tune_over_train": statistics.median(ratios)}
    figures |= {"tune_over_train_least": min(ratios), "tune_over_train_most": max(ratios)}
    return {f"{name}_{steps}_steps": round(value, 2) for name, value in figures.items()}


def main(config: BenchmarkConfig) -> None:
    """Measure and write the result file."""
    figures: dict[str, float] = {}
    for steps in config.steps:
        figures |= measure(config, steps)
    command = command_line("tuning_rate", config, ignore=("output", "note"))
    write_result(config.output, command, figures, note=config.note)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.tuning_rate"))
