"""The loss of a batch: what the model is given, and what its prediction is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.training.batches import batch_seed, sample_batch
from atomdiff.training.objective import preservation_loss, prior_preservation_loss, sample_losses
from atomdiff.training.run import Run
from atomdiff.tuner.selection import selection_penalty


@dataclass(frozen=True)
class Samples:
    """Samples of a forward pass, as the model takes them."""

    latents: Tensor
    """Noisy latents (batch, c, h, w)."""
    timesteps: Tensor
    """Their timesteps (batch,)."""
    prompts: list[int]
    """Index of each sample's prompt."""
    time_ids: Tensor
    """As `Batch` has them (batch, 6)."""


@dataclass(frozen=True)
class TrainingBatch:
    """A batch on the run's device."""

    samples: Samples
    """Instance images, class images, and with output preservation the instance images with the prompts that stay."""
    preserved: Samples | None
    """The last of these, for which the base predicts, too."""
    target: Tensor
    """What is to be predicted for instance and class images (images, c, h, w)."""
    weights: Tensor
    """Weight of each image's loss (images,)."""
    mask: Tensor | None
    """Loss weights (images, 1, h, w) where losses are masked."""
    num_instance_images: int
    """How many of the samples are instance images; they come first."""


def training_batch(run: Run, number: int) -> TrainingBatch:
    """Sample the batch of this number on this process.

    All that is sampled is a function of the seed and of the batch's position among those of all processes, so that two
    processes learn what one does that accumulates two batches; the network's own random numbers (dropout) follow too,
    as the seed is set for all.
    """
    position = number * run.accelerator.num_processes + run.accelerator.process_index
    batch, noised = sample_batch(run, position, torch.manual_seed(batch_seed(run, position)))
    device, total = run.accelerator.device, len(batch.prompts)
    inputs = [each.to(device) for each in (noised.latents, noised.timesteps, batch.time_ids)]
    prompts = batch.prompts + batch.preservation_prompts
    # The instance images come once more, with the prompts whose predictions stay.
    latents, timesteps, time_ids = (torch.cat([each, each[: len(prompts) - total]]) for each in inputs)
    preserved = None
    if batch.preservation_prompts:
        preserved = Samples(latents[total:], timesteps[total:], prompts[total:], time_ids[total:])
    return TrainingBatch(
        Samples(latents, timesteps, prompts, time_ids),
        preserved,
        noised.target.to(device),
        noised.weights.to(device),
        None if batch.weights is None else batch.weights.to(device),
        batch.num_instance_images,
    )


def loss_of(run: Run, number: int, batch: TrainingBatch, prediction: Tensor, base: Tensor | None) -> Tensor:
    """Return the DreamBooth loss of the batch of this number, a scalar.

    Args:
        run: The run.
        number: Of the batch.
        batch: The batch.
        prediction: For all samples (batch, c, h, w).
        base: What the base predicts for `batch.preserved`.
    """
    config, count, total = run.config, batch.num_instance_images, len(batch.target)
    losses = sample_losses(prediction[:total], batch.target, batch.mask) * batch.weights
    loss = prior_preservation_loss(losses, count, config.prior_loss_weight)
    if base is not None:
        kept = preservation_loss(prediction[total:], base, batch.weights[:count])
        loss = loss + config.preservation_weight * kept
    done = number / (config.gradient_accumulation_steps * config.max_train_steps)
    return loss + selection_penalty(run.model.layer_scores, done)


def batch_loss(run: Run, number: int) -> Tensor:
    """Return the DreamBooth loss of the batch of this number on this process, a scalar with a gradient."""
    batch, base = training_batch(run, number), None
    samples, preserved = batch.samples, batch.preserved
    prediction = run.wrapped(samples.latents, samples.timesteps, samples.prompts, samples.time_ids)
    if preserved is not None:
        inputs = preserved.latents, preserved.timesteps, preserved.prompts, preserved.time_ids
        with run.accelerator.autocast():
            base = run.model.predict_base(*inputs)
    return loss_of(run, number, batch, prediction, base)
