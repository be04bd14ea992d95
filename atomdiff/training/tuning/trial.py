"""A trial: a run on the shared base that saves nothing and is measured, and given up early if others do better."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from atomdiff.training.base_model import BasePipeline
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import take_step, train_step
from atomdiff.training.launch import start_accelerator
from atomdiff.training.layer_budget import check_budget
from atomdiff.training.loop import set_learning_rates, update_average
from atomdiff.training.measurements import first_best_step, measure, start_measuring
from atomdiff.training.method import read_text_adapter
from atomdiff.training.optimizers import current_rate
from atomdiff.training.run import Run, build_run
from atomdiff.training.run_log import LOG_FILE, RunLog
from atomdiff.training.signals import StopSignals
from atomdiff.training.tuning.study import bind_data
from atomdiff.training.warm_start import warm_start
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError

DRIFT, STEP, SECONDS = "base_drift", "step", "seconds"
"""What is noted of a trial besides its settings and its validation loss."""


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of a trial in that of the search."""
    return folder / "trials" / f"{number:04d}"


def trial_config(run: TrainConfig, folder: Path, own_folder: Path, interval: int) -> TrainConfig:
    """Return the config of a trial: it shares caches and class images with the others and saves nothing but its logs.

    Args:
        run: With the trial's values.
        folder: Of the search.
        own_folder: Of the trial.
        interval: Steps between measurements, the same in all trials.
    """
    shared: dict[str, Any] = {"cache_dir": run.cache_dir or str(folder / "cache")}
    if run.with_prior_preservation and run.class_data_dir is None:
        shared["class_data_dir"] = str(folder / "class_images" / "{class_name}")
    return replace(
        run,
        output_dir=str(own_folder),
        validation_loss_steps=interval,
        validation_steps=0,
        checkpointing_steps=0,
        save_steps=0,
        evaluate_with=(),
        report_to=None,
        push_to_hub=False,
        hub_model_id=None,
        hub_token=None,
        **shared,
    )


def run_trial(
    trial: optuna.Trial,
    config: TrainConfig,
    base: BasePipeline,
    max_base_drift: float | None,
    stop: StopSignals,
) -> float:
    """Train a trial's run on a copy of the base, and return the validation loss of the parameters that it would save.

    Raises:
        TrialPruned: Its validation loss is above what others had by then, or its base drift above the limit: it grows
            with the steps.
        DivergedError: Its loss or a gradient is not finite.
        UserError: Its settings cannot be trained, or images or base are not those of the other trials.
        KeyboardInterrupt: It was asked to stop.
    """
    started = time.perf_counter()
    accelerator = start_accelerator(config)
    adapter = read_adapter(config.adapter)
    text_adapter = read_text_adapter(config.text_encoder_adapter, adapter) if config.train_text_encoder else None
    run = build_run(config, accelerator, adapter, text_adapter, base)
    try:
        bind_data(trial.study, Path(config.output_dir).parents[1], run.dataset.fingerprint)
        if config.init_from is not None:
            warm_start(run, take_step)
        check_budget(run)
        _train(trial, run, max_base_drift, stop)
    finally:
        _note(trial, run, max_base_drift, time.perf_counter() - started)
        accelerator.free_memory()
    return float(_saved_measurement(run)["validation_loss"])


def _train(trial: optuna.Trial, run: Run, max_base_drift: float | None, stop: StopSignals) -> None:
    """Train to the last step, or until the trial is pruned.

    With `keep_best` an earlier measurement is saved, so that the drift of a later one does not matter. What is measured
    before layers leave for a budget does not either: the file will lack some of those layers.
    """
    config, average = run.config, float("nan")
    first = first_best_step(run, config.max_train_steps)
    limit = float("inf") if max_base_drift is None or config.keep_best else max_base_drift
    start_measuring(run, 0)
    log_file, samples = Path(config.output_dir) / LOG_FILE, run.samples_per_step
    run_log = RunLog(run.accelerator, log_file, 0, config.max_train_steps, config.logging_steps, samples)
    with closing(run_log):
        for step in range(1, config.max_train_steps + 1):
            started = time.perf_counter()
            set_learning_rates(run.optimizer, run.lr_factor(step - 1))
            loss = train_step(run, step)
            average = update_average(average, loss)
            run_log.step(step, loss, average, current_rate(run.optimizer), time.perf_counter() - started)
            measure(run, step)
            if stop.requested:
                raise KeyboardInterrupt
            line = run.measurements.values[-1] if run.measurements.values else {}
            if line.get("step") == step >= first:
                trial.report(line["validation_loss"], step)
                drifted = line.get(DRIFT, 0.0) > limit
                if step < config.max_train_steps and (drifted or trial.should_prune()):
                    raise optuna.TrialPruned


def _saved_measurement(run: Run) -> Mapping[str, Any]:
    """Return the measurement of the parameters that the run would save.

    Raises:
        UserError: The last step could not be measured.
    """
    values, config = run.measurements.values, run.config
    if not values or values[-1]["step"] != config.max_train_steps:
        found = f"no validation loss of step {config.max_train_steps}"
        raise UserError(f"{config.output_dir}: found {found}; free memory, or lower train_batch_size")
    return _best_or_last(run)


def _best_or_last(run: Run) -> Mapping[str, Any]:
    """Return the best measurement with `keep_best`, else the last one; empty before the first after training began."""
    trained = [line for line in run.measurements.values if line["step"]]
    if run.config.keep_best:
        first = first_best_step(run, run.config.max_train_steps)
        candidates = (line for line in trained if line["step"] >= first)
        return min(candidates, key=lambda line: float(line["validation_loss"]), default={})
    return trained[-1] if trained else {}


def _note(trial: optuna.Trial, run: Run, max_base_drift: float | None, seconds: float) -> None:
    """Note how long a trial took, and the base drift of what it would save, or of its last measurement."""
    trial.set_user_attr(SECONDS, round(seconds, 2))
    measured = _best_or_last(run)
    for name in measured.keys() & {STEP, DRIFT}:
        trial.set_user_attr(name, measured[name])
    if DRIFT in measured and max_base_drift is not None:
        trial.set_constraint(DRIFT, measured[DRIFT] - max_base_drift)
