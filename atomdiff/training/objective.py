"""From clean latents to the training loss, as pure tensor functions: noise, target, weighting, prior preservation.

Noisy latents are `alpha * latents + sigma * noise`. Both scales are 0 to 1, with one number a sample, shape (batch,):
`alpha = sqrt(alpha_bar)` and `sigma = sqrt(1 - alpha_bar)` where the variance is kept (`alpha_bar` is "alphas_cumprod"
in diffusers), and `alpha = 1 - sigma` for flow. `(alpha / sigma) ** 2` is the signal-to-noise ratio, SNR.
"""

from typing import get_args

import torch
from torch import Tensor

from atomdiff.utils.choices import PredictionType, TimestepSampling


def sample_timesteps(
    count: int,
    bounds: tuple[int, int],
    sampling: TimestepSampling,
    generator: torch.Generator,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Sample `count` whole timesteps from the first of `bounds` up to but not including the second, shape (count,).

    With `u` the share of the way from the first bound to the second:

    - `uniform`: all alike.
    - `logit_normal`: `logit(u)` is normal with this mean and standard deviation, which prefers middle noise; a mean
      above 0 prefers more. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
      arXiv 2403.03206, section 3.1.
    - `cubic`: `u = 1 - r ** 3` for a uniform r, which prefers much noise. Mou et al., "T2I-Adapter", arXiv 2302.08453,
      section 3.4.
    """
    first, bound = bounds
    if sampling == "uniform":
        return torch.randint(first, bound, (count,), generator=generator)
    if sampling == "logit_normal":
        share = torch.sigmoid(logit_mean + logit_std * torch.randn(count, generator=generator))
    else:
        share = 1 - torch.rand(count, generator=generator) ** 3
    return _timesteps_at(share, bounds)


def timestep_quantiles(
    shares: Tensor,
    bounds: tuple[int, int],
    sampling: TimestepSampling,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Return the timesteps (count,) that `sample_timesteps` stays below with probabilities `shares` (count,)."""
    if sampling == "logit_normal":
        shares = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(shares))
    elif sampling == "cubic":
        shares = 1 - (1 - shares) ** 3
    return _timesteps_at(shares, bounds)


def _timesteps_at(share: Tensor, bounds: tuple[int, int]) -> Tensor:
    first, bound = bounds
    return (first + (share * (bound - first)).long()).clamp(max=bound - 1)  # the share may be rounded to 1


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return the noise (batch, c, h, w) with `strength` times one more normal number added to each whole channel.

    So that a network learns to change an image's mean color. Guttenberg, "Diffusion with Offset Noise", 2023,
    https://www.crosslabs.org/blog/diffusion-with-offset-noise, where the strength is 0.1.
    """
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator)


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return `alpha * latents + sigma * noise`, shape (batch, c, h, w) as both inputs.

    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 4; for flow: Liu, Gong, Liu,
    "Flow Straight and Fast", arXiv 2209.03003, eq. 1, with its time reversed.
    """
    return _wide(alpha) * latents + _wide(sigma) * noise


def training_target(
    latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Return what the network has to predict, shape (batch, c, h, w).

    `epsilon` is the noise (arXiv 2006.11239, eq. 14), `sample` the clean latents, `v_prediction` is
    `alpha * noise - sigma * latents` (Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    arXiv 2202.00512, section 4), and `flow` the velocity `noise - latents` (arXiv 2209.03003, eq. 1; Lipman et al.,
    "Flow Matching for Generative Modeling", arXiv 2210.02747, eq. 23 with sigma_min = 0), which points to the noise.

    Raises:
        ValueError: `prediction_type` is another one.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        return _wide(alpha) * noise - _wide(sigma) * latents
    if prediction_type == "flow":
        return noise - latents
    raise _unknown(prediction_type)


def min_snr_weights(alpha: Tensor, sigma: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Return the loss weight of each sample, shape (batch,): `min(SNR, gamma)` on the error of the clean latents.

    With `SNR = alpha ** 2 / sigma ** 2`, that equals `min(SNR, gamma) / SNR` on the error of epsilon and
    `min(SNR, gamma) * sigma ** 2` on those of v, where it is `min(SNR, gamma) / (SNR + 1)`, and of flow: the latents
    are `alpha * noisy - sigma * v` and `noisy - sigma * flow`, their error is sigma times that of v or flow.
    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, section 3.4; `gamma`
    is 5 there.

    At pure noise (SNR 0) the weight is 1 for epsilon and 0 for all others.

    Raises:
        ValueError: `prediction_type` is none of epsilon, v_prediction, sample, flow.
    """
    alpha_2, sigma_2 = alpha.square(), sigma.square()
    if prediction_type == "epsilon":
        # also right at SNR 0, where min(SNR, gamma) / SNR would be 0 / 0
        return (gamma * sigma_2 / alpha_2).clamp(max=1)
    if prediction_type == "sample":
        return (alpha_2 / sigma_2).clamp(max=gamma)
    if prediction_type in ("v_prediction", "flow"):
        return torch.minimum(alpha_2, gamma * sigma_2)
    raise _unknown(prediction_type)


def sample_losses(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, shape (batch,), computed in float32.

    Args:
        prediction: Of the network (batch, c, h, w).
        target: What it should have been, of that shape.
        weights: Of each place's error (batch, 1, h, w), such as a mask from 0 to 1. The mean is still over all places,
            as in kohya's scripts and by default in OneTrainer: a place counts the same whatever the mask's area is, a
            small subject cannot blow up the gradient, and a mask of ones changes nothing.
    """
    errors = (prediction.float() - target.float()).square()
    if weights is not None:
        errors = errors * weights
    return errors.flatten(1).mean(dim=1)


def prior_preservation_loss(losses: Tensor, instances: int, prior_loss_weight: float) -> Tensor:
    """Return the mean of the first `instances` losses plus `prior_loss_weight` times the mean of the others.

    The others are the class images, and may be absent. `losses` has shape (batch,), the result none. Ruiz et al.,
    "DreamBooth", arXiv 2208.12242, eq. 2.
    """
    loss = losses[:instances].mean()
    if len(losses) > instances:
        loss = loss + prior_loss_weight * losses[instances:].mean()
    return loss


def preservation_loss(prediction: Tensor, base: Tensor, sample_weights: Tensor) -> Tensor:
    """Return the weighted mean squared error of predictions (batch, c, h, w) beside those of the base, a scalar.

    `sample_weights` (batch,) are those of the instance images' losses, at the same timesteps.
    """
    return (sample_losses(prediction, base) * sample_weights).mean()


def _wide(scale: Tensor) -> Tensor:
    return scale[:, None, None, None]  # (batch, 1, 1, 1)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type={prediction_type!r}: expected one of {', '.join(get_args(PredictionType))}")
