"""From clean latents to what a network gets and has to predict, as the base's noise schedule and the run say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from atomdiff.concepts.modelspec import prediction_type
from atomdiff.pipelines.scheduler import Objective, matching_scheduler
from atomdiff.training.config import TrainConfig
from atomdiff.training.objective import add_noise, min_snr_weights, offset_noise, sample_timesteps, training_target
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError


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

    config: TrainConfig
    """The run."""
    predicts: PredictionType
    """What the network predicts."""
    signal: Tensor
    """Scale of the clean latents at each timestep (timesteps,), least noise first."""
    spread: Tensor
    """Scale of the noise at each timestep (timesteps,)."""
    times: Tensor
    """What the network is told at each timestep (timesteps,)."""

    def draw(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """Draw a timestep and noise for each of some clean latents (batch, c, h, w), all on the CPU."""
        config = self.config
        noise = torch.randn(latents.shape, generator=generator)
        chosen = sample_timesteps(
            len(latents),
            (config.min_timestep, len(self.times) if config.max_timestep is None else config.max_timestep),
            config.timestep_sampling,
            generator,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )
        if config.noise_offset:
            noise = offset_noise(noise, config.noise_offset, generator)
        signal, spread = self.signal[chosen], self.spread[chosen]
        weights = torch.ones(len(latents))
        if config.snr_gamma is not None:
            weights = min_snr_weights(signal, spread, config.snr_gamma, self.predicts)
        target = training_target(latents, noise, signal, spread, self.predicts)
        return Noised(add_noise(latents, noise, signal, spread), self.times[chosen], target, weights)


def noise_process(config: TrainConfig, pipe: Any) -> NoiseProcess:
    """Return the noise process of a base, as the run wants it.

    Raises:
        UserError: The run wants something of it that does not go together, or that the base does not have.
    """
    scheduler = matching_scheduler(_objective(config), pipe.scheduler)
    predicts: Any = prediction_type(scheduler)
    if predicts == "flow":
        # A new one: its sigmas, from much noise to little, are those of training until pictures are drawn.
        flow = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sigmas, times = flow.sigmas.flip(0), flow.timesteps.flip(0)
        signal, spread = 1 - sigmas, sigmas
    else:
        alpha_bar = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        signal, spread, times = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.arange(len(alpha_bar))
    for name, value in (("min_timestep", config.min_timestep + 1), ("max_timestep", config.max_timestep or 1)):
        if value > len(times):
            most = f"the base has {len(times)} timesteps"
            raise UserError(f"{name}={getattr(config, name)}: {most}; choose some of them")
    return NoiseProcess(config, predicts, signal, spread, times)


def match_scheduler(config: TrainConfig, pipe: Any) -> None:
    """Give a base the scheduler that draws pictures the way the run trains it.

    Raises:
        UserError: As `matching_scheduler`.
    """
    pipe.scheduler = matching_scheduler(_objective(config), pipe.scheduler)


def _objective(config: TrainConfig) -> Objective:
    return Objective(config.prediction_type, config.rescale_betas_zero_snr, config.flow_shift)
