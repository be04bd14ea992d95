"""The training run: photos of a subject in, a concept out.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv 2208.12242;
the trigger word's vector: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", arXiv 2208.01618.
"""

import math
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from atomdiff.training.anomalies import LossSpikes, detecting_anomalies, refuse_unless_finite, warn_of_spike
from atomdiff.training.base_model import BasePipeline
from atomdiff.training.batches import batch_seed, batches_of, name_images, sample_batch
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.evaluation import evaluate_result
from atomdiff.training.launch import start_accelerator, start_trackers
from atomdiff.training.layer_budget import check_budget, keep_to_budget
from atomdiff.training.loop import clip_gradients, mean_over_processes, set_learning_rates, update_average
from atomdiff.training.measurements import measure, saved_parameters, start_measuring
from atomdiff.training.method import read_text_adapter
from atomdiff.training.objective import preservation_loss, prior_preservation_loss, sample_losses
from atomdiff.training.optimizers import current_rate
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
from atomdiff.training.run_log import LOG_FILE, RunLog
from atomdiff.training.run_record import RunRecord, finish_record, start_record
from atomdiff.training.saving import check_result_path, result_path, save_result
from atomdiff.training.sharding import check_sharding, gather_weights
from atomdiff.training.signals import StopSignals
from atomdiff.training.summary import describe_training
from atomdiff.training.validation import is_validation_step, validate
from atomdiff.training.warm_start import check_start, warm_start
from atomdiff.tuner.read_config import read_adapter
from atomdiff.tuner.selection import selection_penalty
from atomdiff.utils.atomic import remove_leftovers
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log

__all__ = ["TrainConfig", "load_config", "train"]

_FP16_TRIES = 20  # of a step, at half the scale each time: from 2**16 to below one


def train(
    config: TrainConfig, repeated: tuple[Path, RunRecord] | None = None, base: BasePipeline | None = None
) -> Path:
    """Train a concept and write it to `config.output_dir`, with checkpoints, logs and a contact sheet.

    A config with several subjects stands for several runs, `config.runs()`, unless they make up one file.

    On a CPU the same config gives the same bytes, even if the run is stopped and resumed on the way.

    Args:
        config: The run.
        repeated: Folder and record of an earlier run, whose images and base must be those of this one.
        base: What `load_base` gives for the run, which stays as it is; by default it is loaded.

    Returns:
        The concept's file; for other methods than atoms the folder of a PEFT adapter or, for full tuning, a pipeline.

    Raises:
        UserError: Something in the config, the folders or the base does not fit, the loss is not finite any more, or
            the concept cannot be pushed, which is found out before training if it can be.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved, and the message says how to go on, or what failed.
    """
    check_runs([config])
    accelerator = start_accelerator(config)
    with lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext():
        for folder in (config.cache_folder, Path(config.output_dir) / "validation"):
            remove_leftovers(folder)
        path = run_training(config, accelerator, repeated, base)
        if config.evaluate_with:
            accelerator.free_memory()  # of the run, which would lie beside the models that follow
            evaluate_result(config, path, accelerator)
        return path


def run_training(
    config: TrainConfig,
    accelerator: Accelerator,
    repeated: tuple[Path, RunRecord] | None = None,
    base: BasePipeline | None = None,
) -> Path:
    """Do what `train` says in a folder that is this run's alone."""
    adapter = read_adapter(config.adapter)
    path = result_path(adapter, Path(config.output_dir) / config.name)
    check_result_path(path, adapter, (config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path))
    repo_id = choose_repository(config, adapter) if config.push_to_hub and accelerator.is_main_process else None
    text_adapter = read_text_adapter(config.text_encoder_adapter, adapter) if config.train_text_encoder else None
    check_sharding(config, accelerator, adapter)
    snapshot = config_snapshot(config, accelerator, adapter, text_adapter)
    state = read_state(config, snapshot)
    run = build_run(config, accelerator, adapter, text_adapter, base)
    if repeated:
        folder, earlier = repeated
        earlier.check_data(folder, dict(run.dataset.fingerprint))
    if state:
        load_state(run, state)
        check_start(run, state["checkpoint"])
    elif config.init_from is not None:
        warm_start(run, take_step)
    done = state["step"] if state else 0
    if accelerator.is_main_process:
        described = describe_training(config, run.model.parameter_groups(), accelerator.num_processes, done)
        log(f"{run.dataset.description}\n{described}")
        record = start_record(run, snapshot)

    check_budget(run)
    start_trackers(config, accelerator)
    with reporting_divergence(run):
        final_loss = training_loop(run, snapshot, done, state["average_loss"] if state else math.nan)
    if accelerator.is_fsdp2:
        gather_weights(run.model)
    if accelerator.is_main_process:
        trained_with = state["config"] if state and done == config.max_train_steps else config.snapshot()
        with checkpoint_on_error(run, final_loss, snapshot), saved_parameters(run) as step:
            save_result(run, adapter, path, step, final_loss, trained_with)
        finish_record(run, record, path, step, final_loss)
        if is_validation_step(config, config.max_train_steps, done):  # now that nothing can be lost any more
            validate(run, config.max_train_steps)
        report(run, path, step, final_loss)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training() would also part the processes, which may have more runs to do
        tracker.finish()
    if repo_id is not None:
        accelerator.print(f"pushed to {push_concept(config, path, step, repo_id)}")
    return path


def training_loop(run: Run, snapshot: dict[str, Any], done: int, average_loss: float) -> float:
    """Train from the first step that is not done to the last, and return the average loss.

    Raises:
        UserError: As `train_step`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    config, accelerator, output_dir = run.config, run.accelerator, Path(run.config.output_dir)
    start_measuring(run, done)
    if done < config.max_train_steps and is_validation_step(config, done, done):
        validate(run, done)
    log_file, samples = output_dir / LOG_FILE, run.samples_per_step
    run_log = RunLog(accelerator, log_file, done, config.max_train_steps, config.logging_steps, samples)
    spikes = LossSpikes()
    with closing(run_log), StopSignals() as stop:
        for step in range(done + 1, config.max_train_steps + 1):
            started = time.perf_counter()
            set_learning_rates(run.optimizer, run.lr_factor(step - 1))
            loss = train_step(run, step)
            average_loss = update_average(average_loss, loss)
            if (ratio := spikes.ratio(loss)) and accelerator.is_main_process:
                warn_of_spike(step, loss, ratio, images := name_images(run, batches_of(run, step)))
                run.loss_spikes.append({"step": step, "loss": loss, "images": images})
                run_log.note_spike(run.loss_spikes[-1])
            run_log.step(step, loss, average_loss, current_rate(run.optimizer), time.perf_counter() - started)
            measure(run, step)

            stopping = on_any_process(accelerator, stop.requested) and step < config.max_train_steps
            if stopping or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
                save_state(run, step, average_loss, snapshot, stopping)
            if stopping:
                accelerator.wait_for_everyone()  # or the launcher could end the one that is writing
                raise KeyboardInterrupt(how_to_go_on(run, step))
            if step < config.max_train_steps and is_validation_step(config, step, done):
                validate(run, step)
    return average_loss


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


def batch_loss(run: Run, number: int) -> Tensor:
    """Return the DreamBooth loss of the batch of this number, a scalar with a gradient.

    All that is sampled is a function of the seed and of the batch's position among those of all processes, so that two
    processes learn what one does that accumulates two batches; the network's own random numbers (dropout) follow too,
    as the seed is set for all.
    """
    config, accelerator = run.config, run.accelerator
    position = number * accelerator.num_processes + accelerator.process_index
    batch, noised = sample_batch(run, position, torch.manual_seed(batch_seed(run, position)))
    device, count, total = accelerator.device, batch.num_instance_images, len(batch.prompts)
    inputs = [each.to(device) for each in (noised.latents, noised.timesteps, batch.time_ids)]
    weights, target = noised.weights.to(device), noised.target.to(device)
    prompts = batch.prompts + batch.preservation_prompts
    # The instance images come once more, with the prompts whose predictions stay.
    latents, timesteps, time_ids = (torch.cat([each, each[: len(prompts) - total]]) for each in inputs)
    prediction = run.wrapped(latents, timesteps, prompts, time_ids)
    mask = None if batch.weights is None else batch.weights.to(device)
    losses = sample_losses(prediction[:total], target, mask) * weights
    loss = prior_preservation_loss(losses, count, config.prior_loss_weight)
    if batch.preservation_prompts:
        with accelerator.autocast():
            base = run.model.predict_base(latents[total:], timesteps[total:], prompts[total:], time_ids[total:])
        kept = preservation_loss(prediction[total:], base, weights[:count])
        loss = loss + config.preservation_weight * kept
    done = number / (config.gradient_accumulation_steps * config.max_train_steps)
    return loss + selection_penalty(run.model.layer_scores, done)


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Tell whether the flag is set on any process."""
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())
