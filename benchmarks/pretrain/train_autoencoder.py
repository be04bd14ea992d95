"""How the autoencoder learns: error (of objects first), edges, features of the judge; latents bear scale and noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from atomdiff.toybox.judge import Judge
from atomdiff.toybox.world import IMAGE_SIZE
from atomdiff.utils.precision import autocast
from benchmarks.pretrain.architecture import LATENT_CHANNELS
from benchmarks.pretrain.data import World, as_signal
from benchmarks.pretrain.fastest import CAPTURED, fastest
from benchmarks.pretrain.stage import Average, Checkpoints, Phase, Stage, run_stage

_OBJECT_WEIGHT = 3.0
"""What a pixel of the object counts beside one of the scene: patterns and thin parts are few pixels."""


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


def make_loss(vae: AutoencoderKL, judge: Judge) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of images (n, 3, h, w) in [-1, 1] and object masks (n, 1, h, w), as a function that can be compiled.

    A quarter of the batch is restored at half its size from latents scaled down (EQ-VAE, arXiv 2502.09509), which makes
    the latents smooth in space and easier to denoise; a little noise on the other latents keeps the decoder from
    trusting them to the last digit, which no denoiser can deliver.
    """
    half = autocast(vae.device)  # looks the processor up, which cannot be compiled

    def compare(latents: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        restored = vae.decoder(vae.post_quant_conv(latents)).float()
        weight = 1 + (_OBJECT_WEIGHT - 1) * mask
        distance = (restored - x).abs() + 2 * (restored - x).square()
        error = (weight * distance).mean() / weight.mean() + edge_error(restored, x)
        return error + 0.1 * feature_error(judge, restored, x)

    def loss_of(x: Tensor, mask: Tensor) -> Tensor:
        with half:
            mean, spread = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
            spread = spread.clamp(-30, 20)
            width = 0.1 * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=x.device)
            latents = mean + ((0.5 * spread).exp() + width) * torch.randn_like(mean)
            few = len(x) // 4
            small = compare(*(F.avg_pool2d(each[:few], 2) for each in (mean, x, mask)))
            error = 0.75 * compare(latents[few:], x[few:], mask[few:]) + 0.25 * small
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum((1, 2, 3)).mean()
        return error + 1e-6 * divergence / (x.shape[-1] / IMAGE_SIZE) ** 2

    return loss_of


def sizes(batch: int) -> dict[int, int]:
    """Images a step by pixels a side: crops first, whole images then."""
    return {IMAGE_SIZE // 2: 2 * batch, IMAGE_SIZE: batch}


def train_autoencoder(
    vae: AutoencoderKL, judge: Judge, world: World, stage: Stage, batch: int, checkpoints: Checkpoints
) -> None:
    """Train on the world's images and leave the moving average of the weights in `vae`.

    The first three quarters go to crops of half the size, four times cheaper, 2 * `batch` a step.
    """
    judge.requires_grad_(False).eval()
    begin = time.perf_counter()
    phases = [
        fastest_phase(vae, judge, world, side, count, until, checkpoints.folder)
        for (side, count), until in zip(sizes(batch).items(), (0.75, 1.0), strict=True)
    ]
    stage.seconds -= time.perf_counter() - begin  # compiling counts
    average = Average(vae, (0.998,))
    run_stage(stage, vae, phases, average, checkpoints=checkpoints)
    average.write_to_model(0)
    freeze_posterior(vae)


def crops(world: World, side: int, count: int) -> tuple[Tensor, Tensor]:
    """Random crops of random images, floats (count, 3, side, side) in [-1, 1], and of their masks (count, 1, ...)."""
    images, masks, device = world.images, world.masks, world.images.device
    index = torch.randint(len(images), (count,), device=device)[:, None, None, None]
    top, left = torch.randint(images.shape[-1] - side + 1, (2, count, 1), device=device)
    along = torch.arange(side, device=device)
    rows, columns = (top + along)[:, None, :, None], (left + along)[:, None, None, :]
    channels = torch.arange(images.shape[1], device=device)[:, None, None]
    coarse = images.shape[-1] // masks.shape[-1]
    mask = masks[index, 0, rows // coarse, columns // coarse].float()
    return as_signal(images[index, channels, rows, columns]), mask


def fastest_phase(
    vae: AutoencoderKL, judge: Judge, world: World, side: int, count: int, until: float, folder: Path
) -> Phase:
    """The loss of crops, compiled and captured where that is faster and gives the same gradients (see `fastest`)."""
    plain = make_loss(vae, judge)
    ways = {"plain": plain}
    if world.images.is_cuda:
        ways["compiled"] = ways["compiled" + CAPTURED] = torch.compile(make_loss(vae, judge), dynamic=False)
    losses: dict[str, Callable[[], Tensor]] = {
        name: lambda way=way: way(*crops(world, side, count))  # type: ignore[misc]
        for name, way in ways.items()
    }
    best = fastest(f"autoencoder at {side}", folder, vae, losses)
    return Phase(losses[best], until, best.endswith(CAPTURED))


@torch.no_grad()
def freeze_posterior(vae: AutoencoderKL) -> None:
    """Give the encoder no width: the denoiser learns its means, and so should whoever trains on it."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0  # the second half of the channels is the log variance
    vae.quant_conv.bias[LATENT_CHANNELS:] = -20


@torch.no_grad()
def center_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Move the mean of every channel into the network and note the scale; scales latents (n, c, h, w) in place."""
    some = latents[:16384].float()
    mean = some.mean((0, 2, 3))  # (c,)
    vae.quant_conv.bias[:LATENT_CHANNELS] -= mean
    post = vae.post_quant_conv
    post.bias += post.weight.flatten(1) @ mean
    scale = round(1 / (some - mean[None, :, None, None]).std().item(), 4)
    vae.register_to_config(scaling_factor=scale)
    for chunk in latents.split(16384):
        chunk.copy_((chunk.float() - mean[None, :, None, None]) * scale)
    return latents


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int) -> Tensor:
    """Mean latents (n, 16, 16, 16), not yet scaled, in bfloat16 on the device of the images."""
    latents = torch.empty(len(images), LATENT_CHANNELS, 16, 16, dtype=torch.bfloat16, device=images.device)
    for ours, chunk in zip(latents.split(batch), images.split(batch), strict=True):
        with autocast(images.device):
            ours.copy_(vae.encode(as_signal(chunk)).latent_dist.mean)
    return latents
