"""Forward diffusion: clean latents -> noisy latents and training targets, by the base's noise schedule and the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atomdiff.bases.noise_schedule import NoiseSchedule, noise_schedule, prediction_type
from atomdiff.pipelines.scheduler import ScheduleConfig, matching_scheduler
from atomdiff.training.config.objective import ObjectiveConfig
from atomdiff.training.objective import (
    add_noise,
    min_snr_weights,
    offset_noise,
    sample_timesteps,
    timestep_quantiles,
    training_target,
)
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class NoisyLatents:
    """Latents with noise, and what the denoiser learns from them."""

    latents: Tensor
    """Input of the denoiser (batch, c, h, w)."""
    timesteps: Tensor
    """Their timesteps, as the denoiser takes them (batch,)."""
    target: Tensor
    """What the denoiser has to predict (batch, c, h, w)."""
    weights: Tensor
    """Weight of each sample's loss (batch,)."""


@dataclass(frozen=True)
class ForwardDiffusion:
    """The noise schedule, and what is predicted."""

    config: ObjectiveConfig
    """The run."""
    prediction_type: PredictionType
    """What the denoiser predicts."""
    schedule: NoiseSchedule
    """How much noise there is at which timestep."""

    def sample(self, latents: Tensor, generator: torch.Generator) -> NoisyLatents:
        """Sample a timestep and noise for each of some clean latents (batch, c, h, w), all on the CPU."""
        noise = torch.randn(latents.shape, generator=generator)
        chosen = sample_timesteps(len(latents), generator=generator, **self._timestep_options())
        return self._noise(latents, noise, chosen, generator)

    def sample_at(self, shares: Tensor, latents: Tensor, generator: torch.Generator) -> NoisyLatents:
        """Sample noise for clean latents (batch, c, h, w) at fixed timesteps.

        Those are the quantiles at `shares` (batch,) of the distribution that `sample` takes them from.
        """
        noise = torch.randn(latents.shape, generator=generator)
        return self._noise(latents, noise, timestep_quantiles(shares, **self._timestep_options()), generator)

    def _timestep_options(self) -> dict[str, Any]:
        config = self.config
        last = len(self.schedule.timesteps) if config.max_timestep is None else config.max_timestep
        return {
            "bounds": (config.min_timestep, last),
            "sampling": config.timestep_sampling,
            "logit_mean": config.logit_mean,
            "logit_std": config.logit_std,
        }

    def _noise(self, latents: Tensor, noise: Tensor, chosen: Tensor, generator: torch.Generator) -> NoisyLatents:
        config = self.config
        if config.noise_offset:
            noise = offset_noise(noise, config.noise_offset, generator)
        alpha, sigma, timesteps = (values[chosen] for values in self.schedule)
        weights = torch.ones(len(latents))
        if config.snr_gamma is not None:
            weights = min_snr_weights(alpha, sigma, config.snr_gamma, self.prediction_type)
        target = training_target(latents, noise, alpha, sigma, self.prediction_type)
        return NoisyLatents(add_noise(latents, noise, alpha, sigma), timesteps, target, weights)


def forward_diffusion(config: ObjectiveConfig, pipe: Any) -> ForwardDiffusion:
    """Return the forward diffusion of a base, with what the run sets of it.

    Raises:
        UserError: The run wants something of it that does not go together, or that the base does not have.
    """
    scheduler = matching_scheduler(_schedule_config(config), pipe.scheduler)
    schedule = noise_schedule(scheduler)
    count = len(schedule.timesteps)
    for name, value in (("min_timestep", config.min_timestep + 1), ("max_timestep", config.max_timestep or 1)):
        if value > count:
            raise UserError(f"{name}={getattr(config, name)}: the base has {count} timesteps; choose some of them")
    predicted: Any = prediction_type(scheduler)
    return ForwardDiffusion(config, predicted, schedule)


def set_training_scheduler(config: ObjectiveConfig, pipe: Any) -> None:
    """Give a base the scheduler that generates images the way the run trains it.

    Raises:
        UserError: As `matching_scheduler`.
    """
    pipe.scheduler = matching_scheduler(_schedule_config(config), pipe.scheduler)


def _schedule_config(config: ObjectiveConfig) -> ScheduleConfig:
    return ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr, config.flow_shift)
