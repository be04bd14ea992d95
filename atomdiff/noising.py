"""From clean latents to what a network gets and has to predict, as the base's noise schedule says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from atomdiff.objective import add_noise, min_snr_weights, training_target
from atomdiff.train_config import TrainConfig


@dataclass(frozen=True)
class Noised:
    """Latents at a noise level each."""

    latents: Tensor
    """What the network gets (batch, c, h, w)."""
    timesteps: Tensor
    """What it is told of their noise levels (batch,)."""
    target: Tensor
    """What it has to predict (batch, c, h, w)."""
    weights: Tensor
    """Weight of each sample's loss (batch,)."""


@dataclass(frozen=True)
class NoiseProcess:
    """How noise is added: how much at which timestep, and what is predicted."""

    schedule: DDPMScheduler
    """The base's."""
    snr_gamma: float | None
    """Of the min-SNR weighting; None for none."""

    def draw(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a timestep and noise for each of some clean latents (batch, c, h, w), all on the CPU."""
        predicts = self.schedule.config.prediction_type
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(self.schedule), (len(latents),), generator=generator)
        alpha_bar = self.schedule.alphas_cumprod[timesteps]
        weights = torch.ones(len(latents))
        if self.snr_gamma is not None:
            weights = min_snr_weights(alpha_bar, self.snr_gamma, predicts)
        target = training_target(latents, noise, alpha_bar, predicts)
        return Noised(add_noise(latents, noise, alpha_bar), timesteps, target, weights)


def noise_process(config: TrainConfig, pipe: StableDiffusionPipeline) -> NoiseProcess:
    """Return the noise process of a base, as the run wants it."""
    return NoiseProcess(DDPMScheduler.from_config(pipe.scheduler.config), config.snr_gamma)
