"""The training run: photos of a subject in, a concept out.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv 2208.12242;
the trigger word's vector: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", arXiv 2208.01618.
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from torch import Tensor, nn

from atomdiff.pipelines.placeholder_tokens import set_token_embedding
from atomdiff.training.base_model import BasePipeline, all_parts_loaded, generate_images, load_base
from atomdiff.training.checkpoint import choose_checkpoint, find_checkpoints, save_checkpoint
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.dataset import DreamBoothDataset, build_dataset
from atomdiff.training.ema import averaged
from atomdiff.training.fingerprint import differences
from atomdiff.training.launch import frozen_dtype, start_accelerator, start_trackers
from atomdiff.training.method import check_place, place_for, read_text_adapter, save_trained
from atomdiff.training.model import TrainingModel, build_training_model
from atomdiff.training.noise import ForwardDiffusion, forward_diffusion, set_training_scheduler
from atomdiff.training.objective import prior_preservation_loss, sample_losses
from atomdiff.training.optimizers import build_optimizer, current_rate, load_optimizer
from atomdiff.training.preflight import look_first
from atomdiff.training.push import choose_repository, push_concept, row_of, trigger_phrase, validation_prompts
from atomdiff.training.run_log import RunLog, StopSignals, drop_rows, extend_contact_sheet
from atomdiff.training.summary import describe_training
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.atomic import WriteError, remove_leftovers, write_result
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.tensor_cache import DiskCache

__all__ = ["TrainConfig", "load_config", "train"]

_LOSS_SHARE = 0.02  # of a step's loss in the average loss after it
_FP16_TRIES = 20  # of a step, at half the scale each time: from 2**16 to below one


@dataclass(frozen=True)
class Run:
    """The parts of a run that its steps and pictures need."""

    config: TrainConfig
    accelerator: Accelerator
    pipe: BasePipeline
    """The base, with what is trained in it."""
    dataset: DreamBoothDataset
    concept: TrainingModel
    model: nn.Module
    """The concept as accelerate wrapped it."""
    trained: dict[str, nn.Parameter]
    """The concept's trained parameters."""
    optimizer: torch.optim.Optimizer
    rate_factor: Callable[[int], float]
    """Steps done -> factor on the learning rates."""
    diffusion: ForwardDiffusion
    moving_average: EMAModel | None
    """Of the trained parameters, if it is asked for."""
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""


def train(config: TrainConfig) -> Path:
    """Train a concept and write it to `config.output_dir`, with checkpoints, logs and a contact sheet.

    A config with several subjects stands for several runs, `config.runs()`, unless they make up one file.

    On a CPU the same config gives the same bytes, even if the run is stopped and resumed on the way.

    Returns:
        The concept's file; for other methods than atoms the folder of a PEFT adapter or, for full tuning, a pipeline.

    Raises:
        UserError: Something in the config, the folders or the base does not fit, the loss is not finite any more, or
            the concept cannot be pushed, which is found out before training if it can be.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved, and the message says how to go on, or what failed.
    """
    look_first([config])
    accelerator = start_accelerator(config)
    with lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext():
        for folder in (config.cache_folder, Path(config.output_dir) / "validation"):
            remove_leftovers(folder)
        return run_training(config, accelerator)


def run_training(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Do what `train` says in a folder that is this run's alone."""
    output_dir = Path(config.output_dir)
    adapter = read_adapter(config.adapter)
    place = place_for(adapter, output_dir / config.name)
    check_place(place, adapter, (config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path))
    repo_id = choose_repository(config, adapter) if config.push_to_hub and accelerator.is_main_process else None
    text_adapter = read_text_adapter(config.text_encoder_adapter, adapter) if config.train_text_encoder else None
    recipe = recipe_of(config, accelerator, adapter, text_adapter)
    state = read_state(config, recipe)
    run = build_run(config, accelerator, adapter, text_adapter)
    if state:
        load_state(run, state)
    if accelerator.is_main_process:
        count = sum(parameter.numel() for parameter in run.trained.values())
        done = state["step"] if state else 0
        log(f"{run.dataset.description}\n{describe_training(config, count, accelerator.num_processes, done)}")

    start_trackers(replace(config, hub_token=None), accelerator)  # they show the config to others
    final_loss = take_steps(run, recipe, state)
    if accelerator.is_main_process:
        with averaged(run.trained.values(), run.optimizer, run.moving_average):
            none_done = state is not None and state["step"] == config.max_train_steps
            recorded = state.get("config", config.snapshot()) if state and none_done else config.snapshot()
            save_concept(run, adapter, place, final_loss, recorded)
    if shows(config, config.max_train_steps, state["step"] if state else 0):  # now that nothing can be lost any more
        validate(run, config.max_train_steps)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training() would also part the processes, which may have more runs to do
        tracker.finish()
    if repo_id is not None:
        accelerator.print(f"pushed to {push_concept(config, place, repo_id)}")
    return place


def recipe_of(
    config: TrainConfig, accelerator: Accelerator, adapter: PeftConfig | None, text_adapter: PeftConfig | None
) -> dict[str, Any]:
    """Return what a checkpoint must have been written with, so that the run may go on from it."""
    recipe = {
        **config.snapshot(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "adapter": describe_adapter(adapter),
    }
    if config.train_text_encoder:
        recipe["text_encoder_adapter"] = describe_adapter(text_adapter)
    return recipe


def read_state(config: TrainConfig, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state in the checkpoint that the run goes on from, or None if it starts anew.

    Raises:
        UserError: The checkpoint is missing or of another run, or beyond the run's last step.
    """
    checkpoint = choose_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    if checkpoint is None:
        return None
    defaults = {each.name: each.default for each in fields(config) if each.name in recipe}
    state = checkpoint.load(recipe, {name: value for name, value in defaults.items() if value is not MISSING})
    if state["step"] > config.max_train_steps:
        found = f"max_train_steps={config.max_train_steps}, but {checkpoint.folder} is at step {state['step']}"
        raise UserError(f"{found}; take at least as many steps, or go on from an earlier checkpoint")
    return {**state, "checkpoint": str(checkpoint.folder)}


def build_run(
    config: TrainConfig, accelerator: Accelerator, adapter: PeftConfig | None, text_adapter: PeftConfig | None
) -> Run:
    """Load the base, prepare what it learns from, and put what is trained into it."""
    if accelerator.is_main_process:
        log(f"loading the base {config.pretrained_model_name_or_path}")
    pipe = load_base(config)
    set_training_scheduler(config, pipe)
    dataset = build_dataset(config, pipe, accelerator, adapter is None)
    dtype = frozen_dtype(accelerator)
    cache = DiskCache(config.cache_folder)
    if accelerator.is_main_process:
        log("adding what is trained to the base")
    concept = build_training_model(config, pipe, adapter, dataset.prompts, dtype, text_adapter, cache)
    optimizer, rate_factor = build_optimizer(config, concept.parameter_groups(), accelerator.num_processes)
    model, optimizer = accelerator.prepare(concept, optimizer)
    trained = concept.trained_parameters()
    average = EMAModel(trained.values(), decay=config.ema_decay) if config.use_ema else None
    diffusion = forward_diffusion(config, pipe)
    return Run(config, accelerator, pipe, dataset, concept, model, trained, optimizer, rate_factor, diffusion, average)


def take_steps(run: Run, recipe: dict[str, Any], state: dict[str, Any] | None) -> float:
    """Train from the step of a checkpoint's state on, or from the start, and return the average loss.

    Raises:
        UserError: As `train_step`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    config, accelerator, output_dir = run.config, run.accelerator, Path(run.config.output_dir)
    done, average_loss = (state["step"], state["average_loss"]) if state else (0, math.nan)
    if done < config.max_train_steps and shows(config, done, done):
        validate(run, done)
    log_file, samples = output_dir / "training_log.jsonl", samples_per_step(run)
    log = RunLog(accelerator, log_file, done, config.max_train_steps, config.logging_steps, samples)
    with closing(log), StopSignals() as stop:
        for step in range(done + 1, config.max_train_steps + 1):
            started = time.perf_counter()
            for group in run.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * run.rate_factor(step - 1)
            loss = train_step(run, step)
            average_loss = loss if math.isnan(average_loss) else average_loss + (loss - average_loss) * _LOSS_SHARE
            log.step(step, loss, average_loss, current_rate(run.optimizer), time.perf_counter() - started)

            stopped = on_any_process(accelerator, stop.requested) and step < config.max_train_steps
            if stopped or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
                if accelerator.is_main_process:
                    state = {"step": step, "average_loss": average_loss, **state_of(run)}
                    state |= {"config": config.snapshot(), "fingerprint": run.dataset.fingerprint}
                    keep_checkpoint(run, step, state, recipe, stopped)
            if stopped:
                accelerator.wait_for_everyone()  # or the launcher could end the one that is writing
                how = "go on with the same command and --resume_from_checkpoint latest"
                raise KeyboardInterrupt(f"stopped; {output_dir / f'checkpoint-{step}'} is saved: {how}")
            if step < config.max_train_steps and shows(config, step, done):
                validate(run, step)
    return average_loss


def keep_checkpoint(run: Run, step: int, state: dict[str, Any], recipe: dict[str, Any], last: bool) -> None:
    """Save a checkpoint; one that cannot be written is only warned of, unless it is the last, as the run goes on.

    Raises:
        KeyboardInterrupt: The last one cannot be written.
    """
    try:
        save_checkpoint(Path(run.config.output_dir), step, state, recipe, run.config.checkpoints_total_limit)
    except WriteError as error:
        if last:
            raise KeyboardInterrupt(f"stopped at step {step}, which is not saved: {error}") from error
        warnings.warn(f"step {step}: {error}. The training goes on without this checkpoint", stacklevel=1)


def train_step(run: Run, step: int) -> float:
    """Move the parameters once; return the mean loss of the step's batches on all processes.

    In fp16 a step whose gradients are too large is done again with a smaller scale, so that no batch is left out and
    every step counts.

    Raises:
        UserError: The loss or a gradient is not finite; the parameters have not moved.
    """
    if step > run.config.token_steps:
        run.concept.freeze_token_embeddings()
    for _ in range(_FP16_TRIES):
        loss, norm = try_step(run, step)
        if math.isfinite(norm):
            break
    refuse_unless_finite(run, step, "gradient's norm", norm)
    if run.moving_average is not None:
        run.moving_average.step(run.trained.values())
    return loss


def try_step(run: Run, step: int) -> tuple[float, float]:
    """Return the loss and the norm of the gradients; if that is not finite, the parameters have not moved.

    Raises:
        UserError: The loss is not finite; or a gradient, and there is no scale that could be made smaller.
    """
    config, accelerator = run.config, run.accelerator
    losses, norm = [], math.nan
    for part in range(config.gradient_accumulation_steps):
        number = (step - 1) * config.gradient_accumulation_steps + part
        with accelerator.accumulate(run.model):
            loss = batch_loss(run, number)
            losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
            refuse_unless_finite(run, step, "loss", losses[-1])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.concept.clear_frozen_gradients()
                norm = float(accelerator.clip_grad_norm_(run.trained.values(), config.max_grad_norm or math.inf))
                if accelerator.scaler is None:  # which would leave the parameters as they are
                    refuse_unless_finite(run, step, "gradient's norm", norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
    return sum(losses) / len(losses), norm


def batch_loss(run: Run, number: int) -> Tensor:
    """Return the DreamBooth loss of the batch of this number, a scalar with a gradient.

    All that is drawn is a function of the seed and of the batch's position among those of all processes, so that two
    processes learn what one does that accumulates two batches; the network's own random numbers (dropout) follow too,
    as the seed is set for all.
    """
    config, accelerator = run.config, run.accelerator
    position = number * accelerator.num_processes + accelerator.process_index
    generator = torch.manual_seed(derive_seed(config.seed, "batch", position, 0))
    batch = run.dataset.sample(position, config.train_batch_size, config.seed, generator)
    noised = run.diffusion.sample(batch.latents, generator)
    device = accelerator.device
    prediction = run.model(
        noised.latents.to(device), noised.timesteps.to(device), batch.prompts, batch.time_ids.to(device)
    )
    mask = None if batch.weights is None else batch.weights.to(device)
    losses = sample_losses(prediction, noised.target.to(device), mask) * noised.weights.to(device)
    return prior_preservation_loss(losses, batch.num_instance_images, config.prior_loss_weight)


def refuse_unless_finite(run: Run, step: int, name: str, value: float) -> None:
    """Raise a UserError that names the checkpoint to go back to, if `value` is not finite."""
    if math.isfinite(value):
        return
    found = find_checkpoints(Path(run.config.output_dir))
    if run.config.resume_from_checkpoint is None:  # others are of an earlier run
        found = [checkpoint for checkpoint in found if checkpoint.run["saved"] >= run.started]
    back = f"go on from {found[-1].folder} (--resume_from_checkpoint latest)" if found else "start again"
    rates = run.config.learning_rates
    raise UserError(
        f"step {step}: the {name} is {value}; {back} with a learning_rate below {rates['adapter']}"
        + (f" and a token_learning_rate below {rates['token']}" if run.config.train_token else "")
        + (", or with mixed_precision bf16" if run.accelerator.scaler else "")
    )


def state_of(run: Run) -> dict[str, Any]:
    """Return the tensors that a later process needs to go on; all random draws follow from seed and step."""
    scaler = run.accelerator.scaler
    return {
        "trained": {name: parameter.detach().cpu() for name, parameter in run.trained.items()},
        "optimizer": run.optimizer.state_dict(),
        "moving_average": run.moving_average.state_dict() if run.moving_average else None,
        "scaler": scaler.state_dict() if scaler else None,
    }


def load_state(run: Run, state: dict[str, Any]) -> None:
    """Put back what `state_of` returned; learning rates stay those of the config.

    Raises:
        UserError: It is of a run that learned from something else, or has other parameters.
    """
    again = "or start anew, without resume_from_checkpoint, in another output_dir"
    if "fingerprint" not in state:
        said = "does not note what it learned from; photos, captions and base are taken for the same"
        warnings.warn(f"{state['checkpoint']}: {said}", stacklevel=1)
    elif found := differences(state["fingerprint"], run.dataset.fingerprint):
        raise UserError(
            f"{state['checkpoint']}: written with {'; '.join(found)}. Put back what it learned from, {again}"
        )
    needed = {"optimizer", "average_loss"} | ({"moving_average"} if run.moving_average else set())
    shapes = {name: parameter.shape for name, parameter in run.trained.items()}
    if {name: tensor.shape for name, tensor in state["trained"].items()} != shapes or not needed <= state.keys():
        raise UserError(f"{state['checkpoint']}: of another version, with other parameters. Use that version, {again}")
    for name, parameter in run.trained.items():
        parameter.data.copy_(state["trained"][name])
    load_optimizer(run.optimizer, state["optimizer"])
    if run.moving_average is not None:
        run.moving_average.load_state_dict(state["moving_average"])
        run.moving_average.to(run.accelerator.device)
    if run.accelerator.scaler and state.get("scaler"):
        run.accelerator.scaler.load_state_dict(state["scaler"])


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Tell whether the flag is set on any process."""
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


def shows(config: TrainConfig, step: int, start: int) -> bool:
    """Tell whether the contact sheet is to get a row after this step, in a run that goes on from step `start`.

    It may have been stopped after the checkpoint of that step, before the row, or after both.
    """
    last = step == config.max_train_steps
    if not config.validation_steps or not (last or step % config.validation_steps == 0):
        return False
    return not (step == start > 0 and len(row_of(config, step)) >= len(validation_prompts(config)))


def validate(run: Run, step: int) -> None:
    """Draw the validation prompts, each from a seed of its own, as a row of the contact sheet.

    A row that cannot be generated or written is only warned of: the training that would be lost is worth more.
    """
    config, pipe, accelerator = run.config, run.pipe, run.accelerator
    if accelerator.is_main_process:
        prompts = validation_prompts(config)
        log(f"step {step}: drawing {len(prompts)} validation images")
        seeds = [derive_seed(0, "validation", number) for number in range(len(prompts))]
        models = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part.training]
        for model in models:
            model.eval()
        try:
            with averaged(run.trained.values(), run.optimizer, run.moving_average):
                with all_parts_loaded(config, pipe), accelerator.autocast():
                    pictures = generate_images(config, pipe, prompts, seeds)
        except UserError as error:
            warnings.warn(f"step {step}: no row of the contact sheet: {error}", stacklevel=1)
            drop_rows(Path(config.output_dir), step)  # or those of an earlier run would pass for it
            return
        finally:
            for model in models:
                model.train()
        try:
            extend_contact_sheet(Path(config.output_dir), step, pictures, prompts)
        except (OSError, WriteError) as error:
            warnings.warn(f"step {step}: the contact sheet cannot be written ({error})", stacklevel=1)


def samples_per_step(run: Run) -> int:
    """Return how many samples a step sees, on all processes."""
    batch = run.config.train_batch_size * (2 if run.dataset.class_images else 1)
    return batch * run.config.gradient_accumulation_steps * run.accelerator.num_processes


def save_concept(
    run: Run, adapter: PeftConfig | None, place: Path, final_loss: float, recorded: dict[str, Any]
) -> None:
    """Write what was trained, the trigger words included, and the facts of the run.

    Args:
        run: The run.
        adapter: The method.
        place: From `place_for`.
        final_loss: The average loss at the end.
        recorded: The settings that it was trained with.

    Raises:
        WriteError: It cannot be written there; if it can be in the folder for temporary files, the message says where.
    """
    config, pipe = run.config, run.pipe
    for word, vectors in run.concept.learned_embeddings().items():
        set_token_embedding(pipe, word, vectors)
    facts = {
        "config": recorded,
        "steps": config.max_train_steps,
        "seed": config.seed,
        "image_count": run.dataset.num_instance_images,
        "final_loss": final_loss,
    }
    about = {"trigger_phrase": trigger_phrase(config), "training": facts}
    about["base_model"] = config.pretrained_model_name_or_path
    with all_parts_loaded(config, pipe):
        write_result(place, lambda path: save_trained(pipe, adapter, path, **about))
