"""The training run: photos of a subject in, a concept out.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv 2208.12242;
the trigger word's vector: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", arXiv 2208.01618.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig

from atomdiff.training.anomalies import detecting_anomalies, refuse_unless_finite
from atomdiff.training.base_model import BasePipeline
from atomdiff.training.batch_loss import batch_loss
from atomdiff.training.batches import batches_of
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.evaluation import evaluate_result
from atomdiff.training.intermediate import (
    GENERATE_FILE,
    SAVE_FILE,
    drop_saved_steps,
    is_save_step,
    save_step,
    take_requests,
)
from atomdiff.training.launch import start_accelerator, start_trackers
from atomdiff.training.layer_budget import check_budget, keep_to_budget
from atomdiff.training.loop import clip_gradients, mean_over_processes, set_learning_rates
from atomdiff.training.measurements import measure, saved_parameters, start_measuring
from atomdiff.training.method import read_text_adapter
from atomdiff.training.preflight import check_runs
from atomdiff.training.push import choose_repository, push_concept
from atomdiff.training.report.write import report, reporting_divergence
from atomdiff.training.resume import (
    checkpoint_on_error,
    config_snapshot,
    how_to_go_on,
    load_state,
    read_state,
    save_state,
)
from atomdiff.training.run import Run, build_run
from atomdiff.training.run_record import RunRecord, finish_record, start_record
from atomdiff.training.saving import check_result_path, result_path, save_result
from atomdiff.training.sharding import check_sharding, gather_weights
from atomdiff.training.signals import StopSignals
from atomdiff.training.steps_log import StepsLog
from atomdiff.training.summary import describe_training
from atomdiff.training.validation import is_validation_step, validate
from atomdiff.training.warm_start import check_start, warm_start
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.atomic import remove_leftovers
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log

__all__ = ["TrainConfig", "load_config", "train"]

_FP16_TRIES = 20  # of a step, at half the scale each time: from 2**16 to below one


DataCheck = Callable[[dict[str, Any]], None]
"""Takes the keys of what a run learns from (see `fingerprint.py`), and raises a UserError if it should not."""


def train(config: TrainConfig, *, base: BasePipeline | None = None, check_data: DataCheck | None = None) -> Path:
    """Train a concept and write it to `config.output_dir`, with checkpoints, logs and a contact sheet.

    A config with several subjects stands for several runs, `config.runs()`, unless they make up one file.

    On a CPU the same config gives the same bytes, even if the run is stopped and resumed on the way.

    Args:
        config: The run.
        base: What `load_base` gives for the run, which stays as it is; by default it is loaded.
        check_data: Called before the first step, with what the run learns from.

    Returns:
        The concept's file; for other methods than atoms the folder of a PEFT adapter or, for full tuning, a pipeline.

    Raises:
        UserError: Something in the config, the folders or the base does not fit, `check_data` raises it, the loss is
            not finite any more, or the concept cannot be pushed, which is found out before training if it can be.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved, and the message says how to go on, or what failed.
    """
    check_runs([config])
    accelerator = start_accelerator(config)
    with lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext():
        for folder in (config.cache_folder, Path(config.output_dir) / "validation"):
            remove_leftovers(folder)
        path = run_training(config, accelerator, base, check_data)
        if config.evaluate_with:
            accelerator.free_memory()  # of the run, which would lie beside the models that follow
            accelerator.free_memory()  # it collects garbage before it lets go of the run
            evaluate_result(config, path, accelerator)
        return path


@dataclass(frozen=True)
class StartedRun:
    """A run that is about to train, and what its end needs."""

    run: Run
    adapter: PeftConfig | None
    """The method, None for training the whole denoiser."""
    path: Path
    """Where the result is written."""
    snapshot: dict[str, Any]
    """What checkpoints are written with."""
    record: RunRecord | None
    """The run's record; None on other processes than the main one."""
    repo_id: str | None
    """Repository to push to."""
    done: int
    """Steps that were done before."""
    average_loss: float
    """The average loss after them; NaN without any."""
    trained_with: dict[str, Any]
    """Config snapshot of what was trained."""


def run_training(
    config: TrainConfig,
    accelerator: Accelerator,
    base: BasePipeline | None = None,
    check_data: DataCheck | None = None,
) -> Path:
    """Do what `train` says in a folder that is this run's alone."""
    started = start_run(config, accelerator, base, check_data)
    with reporting_divergence(started.run):
        final_loss = training_loop(started)
    return finish_run(started, final_loss)


def start_run(
    config: TrainConfig,
    accelerator: Accelerator,
    base: BasePipeline | None = None,
    check_data: DataCheck | None = None,
) -> StartedRun:
    """Do all that comes before the first step; arguments are those of `train`."""
    adapter = read_adapter(config.adapter)
    path = result_path(adapter, Path(config.output_dir) / config.name)
    check_result_path(path, adapter, (config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path))
    repo_id = choose_repository(config, adapter) if config.push_to_hub and accelerator.is_main_process else None
    text_adapter = read_text_adapter(config.text_encoder_adapter, adapter) if config.train_text_encoder else None
    check_sharding(config, accelerator, adapter)
    snapshot = config_snapshot(config, accelerator, adapter, text_adapter)
    state = read_state(config, snapshot)
    run = build_run(config, accelerator, adapter, text_adapter, base)
    if check_data is not None:
        check_data(dict(run.dataset.fingerprint))
    if state:
        load_state(run, state)
        check_start(run, state["checkpoint"])
    elif config.init_from is not None:
        warm_start(run, take_step)
    done, record = state["step"] if state else 0, None
    if accelerator.is_main_process:
        described = describe_training(config, run.model.parameter_groups(), accelerator.num_processes, done)
        log(f"{run.dataset.description}\n{described}")
        record = start_record(run, snapshot)

    check_budget(run, state)
    start_trackers(config, accelerator)
    average_loss = state["average_loss"] if state else math.nan
    trained_with = state["config"] if state and done == config.max_train_steps else config.snapshot()
    return StartedRun(run, adapter, path, snapshot, record, repo_id, done, average_loss, trained_with)


def finish_run(started: StartedRun, final_loss: float) -> Path:
    """Save what was trained, with its report, and push it if that is asked for; return where it is."""
    run, path, step = started.run, started.path, 0
    config, accelerator = run.config, run.accelerator
    if accelerator.is_fsdp2:
        gather_weights(run.model)
    if started.record is not None:
        with checkpoint_on_error(run, final_loss, started.snapshot), saved_parameters(run) as step:
            save_result(run, started.adapter, path, step, final_loss, started.trained_with)
        finish_record(run, started.record, path, step, final_loss)
        if is_validation_step(config, config.max_train_steps, started.done):  # now that nothing can be lost any more
            validate(run, config.max_train_steps)
        report(run, path, step, final_loss)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training() would also part the processes, which may have more runs to do
        tracker.finish()
    if started.repo_id is not None:
        accelerator.print(f"pushed to {push_concept(config, path, step, started.repo_id)}")
    return path


def training_loop(started: StartedRun) -> float:
    """Train from the first step that is not done to the last, and return the average loss.

    Raises:
        UserError: As `train_step`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    run, done = started.run, started.done
    config, accelerator = run.config, run.accelerator
    start_measuring(run, done)
    drop_saved_steps(run, done)
    if done < config.max_train_steps and is_validation_step(config, done, done):
        validate(run, done)
    steps_log = StepsLog(run, done, started.average_loss)
    with closing(steps_log), StopSignals() as stop:
        for step in range(done + 1, config.max_train_steps + 1):
            began = time.perf_counter()
            set_learning_rates(run.optimizer, run.lr_factor(step - 1))
            loss = train_step(run, step)
            steps_log.note(step, loss, time.perf_counter() - began)
            measure(run, step)

            asked = take_requests(run)
            flags = stop.requested, SAVE_FILE in asked, GENERATE_FILE in asked
            stopping, save, generate = on_any_process(accelerator, *flags)
            stopping &= step < config.max_train_steps
            if stopping or save or is_checkpoint_step(config, step):
                save_state(run, step, steps_log.average_loss, started.snapshot, stopping)
            if save or is_save_step(config, step):
                save_step(run, started.adapter, step, steps_log.average_loss)
            if stopping:
                accelerator.wait_for_everyone()  # or the launcher could end the one that is writing
                raise KeyboardInterrupt(how_to_go_on(run, step))
            if step < config.max_train_steps and (generate or is_validation_step(config, step, done)):
                validate(run, step)
    return steps_log.average_loss


def is_checkpoint_step(config: TrainConfig, step: int) -> bool:
    """Tell whether a checkpoint is saved after this step."""
    return config.checkpointing_steps > 0 and step % config.checkpointing_steps == 0


def train_step(run: Run, step: int) -> float:
    """Train one step: freeze token embeddings if it is time, move the parameters once, follow with their average.

    Returns:
        The mean loss of the step's batches on all processes.

    Raises:
        UserError: As `take_step`.
    """
    if step > run.config.token_steps:
        run.model.freeze_token_embeddings()
    loss = take_step(run, step)
    keep_to_budget(run, step)
    if run.ema is not None:
        run.ema.step(run.trainable.values())
    return loss


def take_step(run: Run, step: int) -> float:
    """Move the parameters once; return the mean loss of the step's batches on all processes.

    In fp16 a step whose gradients are too large is done again with a smaller scale, so that no batch is left out and
    every step counts.

    Raises:
        UserError: The loss or a gradient is not finite; the parameters have not moved.
    """
    for _ in range(_FP16_TRIES):
        loss, norm = try_step(run, step)
        if math.isfinite(norm):
            break
    refuse_unless_finite(run, step, "gradient's norm", norm, batches_of(run, step))
    return loss


def try_step(run: Run, step: int) -> tuple[float, float]:
    """Return the loss and the norm of the gradients; if that is not finite, the parameters have not moved.

    Raises:
        UserError: The loss is not finite; or a gradient, and there is no scale that could be made smaller.
    """
    config, accelerator = run.config, run.accelerator
    losses, norm = [], math.nan
    for number in batches_of(run, step):
        with accelerator.accumulate(run.wrapped):
            numbers = range(number, number + 1)
            with detecting_anomalies(run, step, numbers):
                loss = batch_loss(run, number)
                losses.append(mean_over_processes(accelerator, loss))
                refuse_unless_finite(run, step, "loss", losses[-1], numbers)
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.model.clear_frozen_gradients()
                norm = clip_gradients(accelerator, run.trainable.values(), config.max_grad_norm)
                if accelerator.scaler is None:  # which would leave the parameters as they are
                    refuse_unless_finite(run, step, "gradient's norm", norm, batches_of(run, step))
            run.optimizer.step()
            run.optimizer.zero_grad()
    return sum(losses) / len(losses), norm


def on_any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Tell of each flag whether it is set on any process."""
    gathered = accelerator.gather(torch.tensor([flags], device=accelerator.device))  # (processes, flags)
    return [bool(flag) for flag in gathered.any(0)]
