"""The measurements of a run: when they are made, their log, and the parameters with the lowest validation loss."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atomdiff.training.config import TrainConfig
from atomdiff.training.ema import averaged, restored
from atomdiff.training.run_log import append_line, read_log
from atomdiff.training.validation_loss import FixedSamples
from atomdiff.tuner.selection import first_lasting_step
from atomdiff.utils.atomic import WriteError, write_text, writing
from atomdiff.utils.progress import log

if TYPE_CHECKING:
    from atomdiff.training.run import Run

LOG_FILE = "validation_log.jsonl"


@dataclass(frozen=True)
class BestParameters:
    """The parameters with the lowest validation loss so far, of those that may be saved."""

    step: int
    validation_loss: float
    parameters: Mapping[str, Tensor]
    """By name, on the CPU; averages where the run saves those."""


@dataclass
class Measurements:
    """What a run measures with, and has measured so far."""

    samples: FixedSamples | None = None
    """None: it does not, or another process does."""
    values: list[dict[str, Any]] = field(default_factory=list)
    """The lines of the log: step, losses, base drift and seconds."""
    best: BestParameters | None = None
    """With `keep_best`."""


def is_measured(config: TrainConfig, step: int) -> bool:
    """Tell whether a run measures after this step."""
    interval = config.validation_loss_interval
    return interval > 0 and (step % interval == 0 or step == config.max_train_steps)


def first_best_step(run: Run, num_steps: int) -> int:
    """Return the first step whose parameters a run of so many steps may save as the best.

    Before layers leave for a budget, what is measured has layers that the file would lack.
    """
    return first_lasting_step(run.model.layer_scores, num_steps)


def start_measuring(run: Run, done: int) -> None:
    """Go on with the measurements of a run after `done` steps; those of later steps, and of earlier runs, are removed.

    Raises:
        WriteError: The log cannot be written.
    """
    file, values = Path(run.config.output_dir) / LOG_FILE, run.measurements.values
    if not run.accelerator.is_main_process or (run.measurements.samples is None and not file.is_file()):
        return
    values += [line for line in read_log(file) if line["step"] <= done] if done else []
    write_text(file, "".join(f"{json.dumps(line)}\n" for line in values))
    if run.measurements.samples is None and not values:
        file.unlink()
    if all(line["step"] != done for line in values):
        measure(run, done)


def measure(run: Run, step: int) -> None:
    """Measure the run after a step if it is time, and note it; on the main process only.

    What cannot be measured or noted is only warned of: the training that would be lost is worth more.
    """
    if run.measurements.samples is None or not is_measured(run.config, step):
        return
    started = time.perf_counter()
    try:
        losses, drift = _measure(run, run.measurements.samples, step)
    except RuntimeError as error:  # of torch, such as a lack of memory
        warnings.warn(f"step {step}: the validation loss cannot be measured: {error}", stacklevel=1)
        return
    values = losses | ({"base_drift": sum(drift.values()) / len(drift)} if drift else {})
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        warnings.warn(f"step {step}: the {broken[0]} is {values[broken[0]]}; not noted", stacklevel=1)
        return
    log(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items()))
    seconds = round(time.perf_counter() - started, 3)
    _note(run, {"step": step, **values, "base_drift_by_prompt": drift, "seconds": seconds}, values)


def _measure(run: Run, samples: FixedSamples, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the parameters that would be saved, and keep them if none had a lower validation loss."""
    with averaged(run.trainable.values(), run.optimizer, run.ema), run.model.encoding_anew():
        losses, drift = samples.measure(run.model, run.accelerator)
        loss, best = losses.get("validation_loss", math.nan), run.measurements.best
        may_be_best = run.config.keep_best and step >= first_best_step(run, run.config.max_train_steps)
        if may_be_best and loss < (best.validation_loss if best else math.inf):
            kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in run.trainable.items()}
            run.measurements.best = BestParameters(step, loss, kept)
    return losses, drift


def _note(run: Run, line: dict[str, Any], tracked: dict[str, float]) -> None:
    run.measurements.values.append(line)
    file = Path(run.config.output_dir) / LOG_FILE
    try:
        with writing(file):
            append_line(file, json.dumps(line))
            run.accelerator.log(tracked, step=line["step"])
    except WriteError as error:
        warnings.warn(f"{error}. Training continues; lines are missing there", stacklevel=1)


@contextmanager
def saved_parameters(run: Run) -> Iterator[int]:
    """Give a run the parameters that it saves for a while, and say of which step: the best, averages or the last."""
    parameters, best = run.trainable, run.measurements.best
    if not run.config.keep_best or best is None:
        with averaged(parameters.values(), run.optimizer, run.ema):
            yield run.config.max_train_steps
        return
    log(f"saving the parameters of step {best.step}, with the lowest validation loss ({best.validation_loss:.4f})")
    with restored([*parameters.values()]), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best.parameters[name])
        yield best.step
