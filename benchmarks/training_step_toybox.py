"""One training step of the toybox's base: time and memory of every method of the comparison, side by side.

    python -m benchmarks.training_step_toybox

The seconds of whole runs say little where runs are beside other work. Here every method of configs/experiments that
trains a diffusion model is started on a copy of one base, and they take turns, a step each in every round, in an order
drawn anew: what else the machine does meets all alike. A step is that of `atomdiff train` with the settings of
configs/demo.yaml, on a GPU if there is one: its batch, cached latents, autocast, trained token and optimizer, with each
method's own learning rate. It goes on from step to step, as a run does. Figures are named `<method>:<what>`:

- `step_seconds`: the median over the rounds.
- `over_lora`, `over_atoms`: that over the one of LoRA of rank 16 on the attention, and over the one of `atoms/default`.
- `memory_bytes`: the peak of a step above what there is between steps, as `training_step.py` counts it.

`again` is LoRA of rank 16 on the attention once more, a run of its own: it shows how far from 1 a ratio is by chance.

Prediction, written before the first run, of `over_lora` on a CPU. Most of a step is the forward and backward pass
through the frozen UNet, which all methods share, so most lie between .8 and 1.3. `token/default` is the fastest with
.75: gradients reach the text states, but nothing is computed beside the layers. `atoms/tiny`, `atoms/near_output`,
`ln_tuning`, `ia3` and `beft`: .8 to .95. `atoms/default` 1.15 and `atoms/all` 1.3, LoRA on all layers with convolutions
1.3. What makes a whole weight in every step is slower: `loha`, `lokr`, `dora`, `vera`, `randlora`, `hira` 1.2 to 1.6;
`fourierft`, `waveft`, `oft`, `hra` up to 2; `boft` the slowest with 3. `full/default` is at 1.5, as autocast casts each
weight and every weight has a gradient. The peak of memory is within .8 and 1.3 of that of LoRA, but 1.8 times it for
`full/default`. `again` is between .97 and 1.03.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from atomdiff.training.base_model import load_base
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.dreambooth import StartedRun, start_run
from atomdiff.training.launch import start_accelerator
from atomdiff.utils.machine import describe_device, describe_processor
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import EXPERIMENTS, ordered_methods
from benchmarks.result_file import command_line, write_result
from benchmarks.subjects_per_batch import step_alone
from benchmarks.timing import take_turns
from benchmarks.training_step import allocations

REFERENCES = {"lora": "lora/attention_r16", "atoms": "atoms/default"}
"""What the step of each method is compared with, by its name in the figures."""
AGAIN = "again"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    methods: tuple[str, ...] = ()
    """Folders under configs/experiments, besides the two that all are compared with. Default: all that train a
    diffusion model."""
    repeats: int = 20
    """Rounds that count."""
    run: str = "configs/demo.yaml"
    """Settings of the training runs."""
    photos: str = "samples/subjects/mug"
    """Photos of the subject, in a folder named like its class."""
    output: str = "benchmarks/results/training_step_toybox.json"
    """The result file."""


def run_config(config: BenchmarkConfig, name: str, folder: Path) -> TrainConfig:
    """The run of a method, which writes nothing on its way."""
    method, photos = REFERENCES["lora"] if name == AGAIN else name, Path(config.photos)
    options = ["--config", config.run, "--adapter", str(EXPERIMENTS / method / "adapter.json")]
    return dataclasses.replace(
        load_config([*options, "--instance_data_dir", str(photos), "--class_name", photos.name]),
        output_dir=str(folder / name),
        cache_dir=str(folder / "cache"),
        checkpointing_steps=0,
        validation_steps=0,
        validation_loss_steps=0,
        report_to=None,
    )


def stepper(started: StartedRun) -> Callable[[], None]:
    """A function that trains the next step of a run each time."""
    numbers = count(started.done + 1)
    return lambda: step_alone(started, next(numbers))


def measure(config: BenchmarkConfig) -> dict[str, float]:
    """All figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [*dict.fromkeys([*REFERENCES.values(), *(config.methods or ordered_methods())]), AGAIN]
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        runs = {name: run_config(config, name, Path(folder)) for name in names}
        base = load_base(runs[names[0]])
        for name, run in runs.items():
            step = steps[name] = stepper(start_run(run, start_accelerator(run), base=base))
            step()  # what is made at the first step is there from then on
            with allocations(device) as found:
                step()
            memory[name] = found["peak"]
            print(f"{name:<24}{memory[name] / 1e6:9.1f} MB", flush=True)
        seconds = take_turns(steps, config.repeats, device)
    figures: dict[str, float] = {}
    for name in names:
        figures[f"{name}:step_seconds"] = seconds[name]
        for label, reference in REFERENCES.items():
            figures[f"{name}:over_{label}"] = seconds[name] / seconds[reference]
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return rounded | {f"{name}:memory_bytes": peak for name, peak in memory.items()}


def main(config: BenchmarkConfig) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    machine = f"{describe_processor()}; {describe_device()}"
    write_result(config.output, command_line("training_step_toybox", config), measure(config), machine)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.training_step_toybox"))
