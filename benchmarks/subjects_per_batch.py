"""Subjects an hour: several trained in one batch beside one after the other.

    python -m benchmarks.subjects_per_batch

The subjects of samples/subjects, each with its photos, on a base that is loaded once; on a GPU if there is one. `alone`
are runs one after the other, as `atomdiff train` makes them. What is measured of each number of subjects in a batch:

- `step`: the seconds of a step, a subject. All take turns, one step each in every round, in an order drawn anew;
  medians over the rounds.
- `subjects_an_hour`: from that, with the seconds that a subject takes before and after its steps, for runs of
  `run_steps` steps; `over_alone` is its ratio to runs alone.
- `memory`: the peak of a step above what there is between steps, as the allocator counts it.
- `difference`: after `steps` steps from the start, the largest difference of a trained parameter from that of the run
  alone, as a share of the largest number in its tensor; `difference_mean` is the mean over all parameters.

Prediction, written after a look at single steps and before the first run. On a CPU, a product of eight images is as
fast for each of them as one of 64, so that only calls of small layers gain: with `train_batch_size` 8, 1.05 times the
subjects an hour of runs alone at two a batch and 1.1 times at four and at eight; with `train_batch_size` 2, 1.2 times
at eight. Adapter layers are called once a subject, so that a GPU gains in all other layers: twice at eight subjects of
two images, 1.1 times at eight of eight. The memory of activations grows with the subjects. Differences stay below 1e-3
after 20 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from atomdiff.training.base_model import load_base
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.dreambooth import StartedRun, finish_run, start_run, train_step
from atomdiff.training.joint_denoiser import JointDenoiser
from atomdiff.training.joint_step import Member
from atomdiff.training.joint_step import train_step as train_step_together
from atomdiff.training.launch import start_accelerator
from atomdiff.training.loop import set_learning_rates
from atomdiff.training.steps_log import StepsLog
from atomdiff.utils.machine import describe_device, describe_processor
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds, take_turns
from benchmarks.training_step import allocations

ROOT = Path(__file__).parents[1]
ALONE = "alone"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    subjects_per_batch: tuple[int, ...] = (1, 2, 4, 8)
    """Subjects in a batch."""
    train_batch_size: tuple[int, ...] = (2, 8)
    """Images of each subject in a step."""
    repeats: int = 5
    """Rounds that count."""
    steps: int = 20
    """Steps after which the parameters are compared; 0 for no comparison."""
    run_steps: int = 300
    """Steps of a run, for the subjects an hour."""
    config: str = "configs/demo.yaml"
    """Settings of the runs."""
    output: str = "benchmarks/results/subjects_per_batch.json"
    """The result file."""


def run_config(config: BenchmarkConfig, number: int, batch_size: int, folder: Path) -> TrainConfig:
    """The run of a subject; after the last of samples/subjects comes the first one again."""
    subjects = sorted(each for each in (ROOT / "samples" / "subjects").iterdir() if each.is_dir())
    subject = subjects[number % len(subjects)]
    return dataclasses.replace(
        load_config(["--config", config.config, "--instance_data_dir", str(subject), "--class_name", subject.name]),
        output_dir=str(folder / str(number)),
        train_batch_size=batch_size,
        max_train_steps=config.run_steps,
        checkpointing_steps=0,
        validation_loss_steps=0,
        report_to=None,
    )


def start(config: BenchmarkConfig, count: int, batch_size: int, folder: Path, base: Any) -> list[StartedRun]:
    """Runs of the first subjects, before their first step, on copies of a base."""
    runs = [run_config(config, number, batch_size, folder) for number in range(count)]
    return [start_run(run, start_accelerator(run), base=base) for run in runs]


def join(started: Sequence[StartedRun]) -> Callable[[int], Any]:
    """A function that trains a step, of a number, of all these runs in one batch."""
    members = [Member(number, each, StepsLog(each.run, 0, math.nan, show=False)) for number, each in enumerate(started)]
    return partial(train_step_together, members, JointDenoiser([each.run.model for each in started]))


def step_alone(started: StartedRun, step: int) -> None:
    """Train a step of a run alone."""
    set_learning_rates(started.run.optimizer, started.run.lr_factor(step - 1))
    train_step(started.run, step)


def measure_steps(config: BenchmarkConfig, batch_size: int, base: Any, device: str) -> dict[str, float]:
    """The seconds of a step, a subject, of the runs alone and of each number in a batch; memory; time around steps."""
    figures: dict[str, float] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        started: list[StartedRun] = []
        most = max(config.subjects_per_batch)
        figures["around_steps"] = seconds(lambda: started.extend(start(config, most, batch_size, folder, base)), device)
        counts: dict[str, int] = {ALONE: 1} | {str(count): count for count in config.subjects_per_batch}
        joint = {str(count): join(started[:count]) for count in config.subjects_per_batch}
        works = {name: partial(joint.get(name, partial(step_alone, started[0])), 1) for name in counts}
        for name, work in works.items():
            work()
            with allocations(device) as memory:
                work()
            figures[f"memory_{name}"] = memory["peak"]
        for name, found in take_turns(works, config.repeats, device).items():
            figures[f"step_{name}"] = found / counts[name]
        figures["around_steps"] += seconds(lambda: [finish_run(each, 0.0) for each in started], device)
        figures["around_steps"] /= most
    for name in counts:
        of_run = figures["around_steps"] + config.run_steps * figures[f"step_{name}"]
        figures[f"subjects_an_hour_{name}"] = 3600 / of_run
        figures[f"over_alone_{name}"] = figures[f"subjects_an_hour_{name}"] / figures[f"subjects_an_hour_{ALONE}"]
    return figures


def compare(config: BenchmarkConfig, batch_size: int, base: Any) -> dict[str, float]:
    """How far parameters trained together are from those of the same runs alone."""
    count = min(3, max(config.subjects_per_batch))
    with TemporaryDirectory() as name:
        alone = start(config, count, batch_size, Path(name) / ALONE, base)
        together = start(config, count, batch_size, Path(name) / "together", base)
        step_together = join(together)
        for step in range(1, config.steps + 1):
            for each in alone:
                step_alone(each, step)
            step_together(step)
        pairs = [(one.run.trainable, other.run.trainable) for one, other in zip(alone, together, strict=True)]
    return differences(pairs)


@torch.no_grad()
def differences(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float]:
    """Largest and mean difference of the second parameters of pairs, as shares of the largest number in a tensor."""
    errors = [
        ((other[name] - parameter).abs() / parameter.abs().max().clamp(min=1e-9)).flatten()
        for one, other in pairs
        for name, parameter in one.items()
    ]
    return {"difference": float(torch.cat(errors).max()), "difference_mean": float(torch.cat(errors).mean())}


def measure(config: BenchmarkConfig) -> dict[str, float]:
    """All figures, named `<what>[_<subjects in a batch>]_<images of each>`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, float] = {}
    with TemporaryDirectory() as name:
        base = load_base(run_config(config, 0, 1, Path(name)))
    for batch_size in config.train_batch_size:
        found = measure_steps(config, batch_size, base, device)
        if config.steps:
            found |= compare(config, batch_size, base)
        figures |= {f"{name}_{batch_size}": float(f"{value:.4g}") for name, value in found.items()}
        print({name: value for name, value in figures.items() if "over_alone" in name}, flush=True)
    return figures


def main(config: BenchmarkConfig) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    machine = f"{describe_processor()}; {describe_device()}"
    write_result(config.output, command_line("subjects_per_batch", config), measure(config), machine)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.subjects_per_batch"))
