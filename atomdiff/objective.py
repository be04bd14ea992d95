"""From clean latents to the training loss, as pure tensor functions: noise, target, weighting, prior preservation.

`alpha_bar` is the share of the signal's variance left after t steps of noise, called "alphas_cumprod" in diffusers.
Wherever it is a parameter it has one number a sample, shape (batch,), in (0, 1], or [0, 1] for schedules that end
in pure noise.
"""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return `sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise`, shape (batch, c, h, w) as both inputs.

    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 4.
    """
    signal, spread = _scales(alpha_bar)
    return signal * latents + spread * noise


def training_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return what the network has to predict, shape (batch, c, h, w).

    `epsilon` is the noise (arXiv 2006.11239, eq. 14), `sample` the clean latents, and `v_prediction` is
    `sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * latents` (Salimans, Ho, "Progressive Distillation for Fast Sampling
    of Diffusion Models", arXiv 2202.00512, section 4).

    Raises:
        ValueError: `prediction_type` is another one.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        signal, spread = _scales(alpha_bar)
        return signal * noise - spread * latents
    raise _unknown(prediction_type)


def min_snr_weights(alpha_bar: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Return the loss weight of each sample, shape (batch,): `min(SNR, gamma)` on the error of the clean latents.

    With `SNR = alpha_bar / (1 - alpha_bar)`, that equals `min(SNR, gamma) / SNR` on the error of epsilon and
    `min(SNR, gamma) / (SNR + 1)` on that of v. Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
    Strategy", arXiv 2303.09556, section 3.4; `gamma` is 5 there.

    Raises:
        ValueError: `prediction_type` is none of epsilon, v_prediction, sample.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # also right at SNR 0, where min(SNR, gamma) / SNR would be 0 / 0
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))  # the fraction times SNR + 1 = 1 / (1 - alpha_bar)
    raise _unknown(prediction_type)


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, shape (batch,), computed in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def prior_preservation_loss(losses: Tensor, instances: int, prior_loss_weight: float) -> Tensor:
    """Return the mean of the first `instances` losses plus `prior_loss_weight` times the mean of the others.

    The others are the class pictures, and may be absent. `losses` has shape (batch,), the result none. Ruiz et al.,
    "DreamBooth", arXiv 2208.12242, eq. 2.
    """
    loss = losses[:instances].mean()
    if len(losses) > instances:
        loss = loss + prior_loss_weight * losses[instances:].mean()
    return loss


def _scales(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar[:, None, None, None]  # (batch, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type={prediction_type!r}: expected epsilon, v_prediction or sample")
