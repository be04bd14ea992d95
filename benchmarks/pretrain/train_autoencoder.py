"""How the autoencoder learns: absolute error, edges, features of the judge; latents survive scaling and noise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from atomdiff.toybox.world.judge import Judge
from benchmarks.pretrain.architecture import LATENT_CHANNELS
from benchmarks.pretrain.data import as_signal
from benchmarks.pretrain.stage import Average, Stage, run_stage


def edge_error(restored: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighboring pixels."""
    error = restored - x
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def feature_error(judge: Judge, restored: Tensor, x: Tensor) -> Tensor:
    """Mean distance of the judge's features at its three finest levels, normalized over channels."""
    total = torch.zeros((), device=x.device)
    for ours, theirs in zip(judge.features(restored)[:3], judge.features(x)[:3], strict=True):
        total = total + (F.normalize(ours.float(), dim=1) - F.normalize(theirs.float(), dim=1)).square().sum(1).mean()
    return total / 3


def train_autoencoder(vae: AutoencoderKL, judge: Judge, images: Tensor, stage: Stage, batch: int) -> None:
    """Train on images (n, 3, 128, 128) of bytes and leave the moving average of the weights in `vae`.

    One batch in four is restored at half its size from latents scaled down (EQ-VAE, arXiv 2502.09509), which makes the
    latents smooth in space and easier to denoise; a little noise on the latents keeps the decoder from trusting them to
    the last digit, which no denoiser can deliver.
    """
    device = images.device
    judge.requires_grad_(False).eval()
    average = Average(vae, (0.998,))

    def loss_of(progress: float) -> Tensor:
        x = as_signal(images[torch.randint(len(images), (batch,), device=device)])
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            if torch.rand(()) < 0.25:
                z, x = F.avg_pool2d(z, 2), F.avg_pool2d(x, 2)
            else:
                noise = 0.1 * z.detach().std() * torch.rand(len(z), 1, 1, 1, device=device)
                z = z + noise * torch.randn_like(z)
            restored = vae.decode(z).sample.float()
            perceived = feature_error(judge, restored, x)
        error = (restored - x).abs().mean() + (restored - x).square().mean() + edge_error(restored, x)
        return error + 0.1 * perceived + 1e-6 * posterior.kl().mean()

    run_stage(stage, vae, loss_of, average.update)
    average.write_to_model(0)
    freeze_posterior(vae)


@torch.no_grad()
def freeze_posterior(vae: AutoencoderKL) -> None:
    """Give the encoder no width: the denoiser learns its means, and so should whoever trains on it."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0  # the second half of the channels is the log variance
    vae.quant_conv.bias[LATENT_CHANNELS:] = -20


@torch.no_grad()
def center_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Move the mean of every channel into the network and note the scale; gives the scaled latents (n, c, h, w)."""
    mean = latents.float().mean((0, 2, 3))  # (c,)
    vae.quant_conv.bias[:LATENT_CHANNELS] -= mean
    post = vae.post_quant_conv
    post.bias += post.weight.flatten(1) @ mean
    centered = latents.float() - mean[None, :, None, None]
    scale = round(1 / centered.std().item(), 4)
    vae.register_to_config(scaling_factor=scale)
    return (centered * scale).to(latents.dtype)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int) -> Tensor:
    """Mean latents (n, 16, 16, 16), not yet scaled, in bfloat16 on the device of the images."""
    means = []
    for chunk in images.split(batch):
        with torch.autocast(images.device.type, torch.bfloat16):
            means.append(vae.encode(as_signal(chunk)).latent_dist.mean.to(torch.bfloat16))
    return torch.cat(means)
