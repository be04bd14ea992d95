"""Validation loss: the loss on held-out and on training images at noise and timesteps that never change.

The training loss of two steps differs mostly by their noise and timesteps. At the same noise and timesteps in every
measurement, of the base too, a few samples are enough to see a concept learn, and to see it overfit. In the same way,
base drift is how far predictions for prompts without the trigger word are from those of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from atomdiff.training.dataset import DreamBoothDataset, EncodedImages
from atomdiff.training.ema import evaluating
from atomdiff.training.model import TrainingModel
from atomdiff.training.noise import ForwardDiffusion, NoisyLatents
from atomdiff.training.objective import sample_losses
from atomdiff.utils.progress import note_progress
from atomdiff.utils.seeds import derive_seed

_SAMPLES = {"validation_loss": 16, "training_images_loss": 8}
_DRIFT_SAMPLES = 2  # of each prompt


@dataclass(frozen=True)
class FixedBatch:
    """Samples of one forward pass, on the CPU."""

    noisy: NoisyLatents
    prompts: list[int]
    """Index of each sample's prompt."""
    time_ids: Tensor
    """As `Latents` has them (batch, 6)."""
    mask: Tensor | None
    """Weights of the losses' places (batch, 1, h, w)."""


@dataclass(frozen=True)
class FixedSamples:
    """What every measurement of a run is made with."""

    losses: Mapping[str, Sequence[FixedBatch]]
    """Samples by the name of their loss: `validation_loss`, if there are held-out images, `training_images_loss`."""
    drift: Mapping[str, Sequence[tuple[FixedBatch, Tensor]]]
    """Samples of each prompt without a trigger word, and what the base predicts (batch, c, h, w)."""

    def measure(self, model: TrainingModel, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Return the losses by name, and the base drift by prompt, of the model as it is.

        Base drift is the mean squared difference of the predictions from the base's, as a share of the mean square of
        the base's.
        """
        losses = {name: _mean_loss(model, accelerator, batches) for name, batches in self.losses.items()}
        drift = {}
        for prompt, samples in self.drift.items():
            pairs = [(_predict(model, accelerator, batch).cpu(), base) for batch, base in samples]
            difference = sum(float((prediction - base).square().sum()) for prediction, base in pairs)
            drift[prompt] = difference / sum(float(base.square().sum()) for _, base in pairs)
        return losses, drift


def fix_samples(
    dataset: DreamBoothDataset,
    diffusion: ForwardDiffusion,
    model: TrainingModel,
    accelerator: Accelerator,
    batch_size: int,
) -> FixedSamples:
    """Choose the samples of a run's measurements; nothing has been trained yet.

    Forward passes are of at most `batch_size` samples.
    """
    images = {"validation_loss": dataset.held_out_images, "training_images_loss": dataset.instance_images}
    losses = {
        name: fixed_batches(buckets, _SAMPLES[name], diffusion, batch_size)
        for name, buckets in images.items()
        if buckets
    }
    drift = {}
    for prompt in dataset.other_prompts:
        batches = fixed_batches(dataset.instance_images, _DRIFT_SAMPLES, diffusion, batch_size, prompt)
        base = [_predict(model, accelerator, batch, base=True).cpu() for batch in batches]
        drift[dataset.prompts[prompt]] = list(zip(batches, base, strict=True))
    return FixedSamples(losses, drift)


def fixed_batches(
    buckets: Sequence[EncodedImages],
    count: int,
    diffusion: ForwardDiffusion,
    batch_size: int,
    prompt: int | None = None,
) -> list[FixedBatch]:
    """Return batches of `count` samples in all, whose timesteps are spread evenly over those that the run samples.

    They depend on the images, not on the run's seed, and images take turns; if there are more images than samples,
    some come, evenly spread. The prompts are the images' own, or all are `prompt`.
    """
    places = [(bucket, image) for bucket in buckets for image in range(len(bucket.prompts))]
    step = max(len(places), count)
    chosen = [(*places[number * step // count % len(places)], number) for number in range(count)]
    batches = []
    for bucket in buckets:
        samples = []
        for _, image, number in (each for each in chosen if each[0] is bucket):
            generator = torch.Generator().manual_seed(derive_seed(0, "validation loss", number))
            latents = bucket.latents.sample([image], generator)
            noisy = diffusion.sample_at(torch.tensor([(number + 0.5) / count]), latents.latents, generator)
            own = bucket.prompts[image][0] if prompt is None else prompt
            samples.append(FixedBatch(noisy, [own], latents.time_ids, latents.weights))
        batches += [_join(samples[first : first + batch_size]) for first in range(0, len(samples), batch_size)]
    return batches


def _join(batches: Sequence[FixedBatch]) -> FixedBatch:
    noisy = [batch.noisy for batch in batches]
    masks = [batch.mask for batch in batches if batch.mask is not None]
    return FixedBatch(
        NoisyLatents(
            torch.cat([each.latents for each in noisy]),
            torch.cat([each.timesteps for each in noisy]),
            torch.cat([each.target for each in noisy]),
            torch.cat([each.weights for each in noisy]),
        ),
        [prompt for batch in batches for prompt in batch.prompts],
        torch.cat([batch.time_ids for batch in batches]),
        torch.cat(masks) if masks else None,
    )


def _mean_loss(model: TrainingModel, accelerator: Accelerator, batches: Iterable[FixedBatch]) -> float:
    losses = []
    for batch in batches:
        prediction = _predict(model, accelerator, batch)
        mask = None if batch.mask is None else batch.mask.to(prediction.device)
        target, weights = (each.to(prediction.device) for each in (batch.noisy.target, batch.noisy.weights))
        losses += (sample_losses(prediction, target, mask) * weights).tolist()
    return sum(losses) / len(losses)


@torch.no_grad()
def _predict(model: TrainingModel, accelerator: Accelerator, batch: FixedBatch, base: bool = False) -> Tensor:
    """Return what the model, or the base, predicts for a batch (batch, c, h, w), in float32.

    The model itself is called, as several processes do not measure together.
    """
    note_progress()
    predict: Callable[..., Tensor] = model.predict_base if base else model
    inputs = (each.to(accelerator.device) for each in (batch.noisy.latents, batch.noisy.timesteps))
    with evaluating([model.denoiser, *model.text_encoders.values()]), accelerator.autocast():
        return predict(*inputs, batch.prompts, batch.time_ids.to(accelerator.device)).float()
