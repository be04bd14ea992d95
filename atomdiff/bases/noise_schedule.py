"""The noise schedule of forward diffusion and what is predicted, as a base's scheduler says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class NoiseSchedule(NamedTuple):
    """The scales in `alpha * latents + sigma * noise` at each timestep (timesteps,), least noise first."""

    alpha: Tensor
    """`sqrt(alpha_bar)`, where `alpha_bar` is "alphas_cumprod" in diffusers; for flow `1 - sigma`."""
    sigma: Tensor
    """`sqrt(1 - alpha_bar)`; for flow what diffusers calls "sigmas"."""
    timesteps: Tensor
    """As the denoiser takes them."""


def prediction_type(scheduler: Any) -> str:
    """Return what a scheduler says is predicted: epsilon, v_prediction, sample or flow; empty if it does not say."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    configured = getattr(getattr(scheduler, "config", None), "prediction_type", "")
    return "flow" if configured == "flow_prediction" else str(configured or "")


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """Return the noise schedule that a scheduler has in training."""
    import torch
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if prediction_type(scheduler) == "flow":
        # A new one: its sigmas, from much noise to little, are those of training until images are generated.
        flow = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sigma, timesteps = flow.sigmas.flip(0), flow.timesteps.flip(0)
        return NoiseSchedule(1 - sigma, sigma, timesteps)
    alpha_bar = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return NoiseSchedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.arange(len(alpha_bar)))
