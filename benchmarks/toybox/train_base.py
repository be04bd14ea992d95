"""How the toybox's base model learns: the autoencoder first, then text encoder and UNet on its latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from atomdiff.toybox.base import (
    DOWNSAMPLING,
    LATENT_CHANNELS,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from atomdiff.toybox.scenes import Caption, shorten
from atomdiff.training.saving import write_pipeline
from atomdiff.utils.atomic import new_file
from atomdiff.utils.precision import autocast
from atomdiff.utils.progress import ProgressBar
from benchmarks.toybox.data import caption_of

CHECKPOINT_STEPS = 500


@dataclass(frozen=True)
class Stage:
    """How long and how fast one network trains."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0


def as_signal(images: Tensor) -> Tensor:
    """Images (n, h, w, 3) of bytes as (n, 3, h, w) in [-1, 1], channels last in memory."""
    return rearrange(images, "n h w c -> n c h w").float() / 127.5 - 1


def run_stage(
    name: str,
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    folder: Path,
    checkpoint_steps: int = CHECKPOINT_STEPS,
) -> list[float]:
    """Train `model` on `loss_of(step)` with AdamW and a cosine schedule, resuming from the folder's checkpoint.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, stage.steps // 40, stage.steps)
    path = folder / f"{name}.pt"
    losses: list[float] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses = state["losses"]
    model.train()
    bar = ProgressBar(range(len(losses), stage.steps), name, stage.steps, initial=len(losses), mininterval=10)
    for step in bar:
        torch.manual_seed(stage.seed * 1_000_003 + step)
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}", refresh=False)
        if (step + 1) % checkpoint_steps == 0 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            with new_file(path) as file, file.open("wb") as opened:
                torch.save({**state, "schedule": schedule.state_dict()}, opened)
    model.eval()
    return losses


def patch_basis(images: Tensor) -> Tensor:
    """The leading principal directions (8, 48) of all 4x4 patches of the images (n, 64, 64, 3)."""
    patches = rearrange(as_signal(images), "n c (h p) (w q) -> (n h w) (c p q)", p=DOWNSAMPLING, q=DOWNSAMPLING)
    vectors = torch.linalg.eigh(patches.T.double() @ patches.double())[1]
    return vectors[:, -LATENT_CHANNELS:].flip(1).T.float()


def train_vae(vae: AutoencoderKL, images: Tensor, stage: Stage, folder: Path, device: torch.device) -> list[float]:
    """Train the autoencoder on absolute error, a little KL, and a pull of its latents towards principal components.

    The pull gives the latents a natural scale, coarse color large and detail small, which the diffusion then learns
    in that order. The first three quarters of the steps see 32x32 crops: four times cheaper, the same kernels.
    """
    basis = patch_basis(images[:2000]).to(device)
    kernel = rearrange(basis, "o (c p q) -> o c p q", c=3, p=DOWNSAMPLING)

    def loss_of(step: int) -> Tensor:
        crop = 32 if step < 0.75 * stage.steps else images.shape[1]
        batch = stage.batch_size * (2 if crop == 32 else 1)
        index = torch.randint(len(images), (batch,))
        top, left = (4 * int(torch.randint((images.shape[1] - crop) // 4 + 1, ())) for _ in range(2))
        x = as_signal(images[index, top : top + crop, left : left + crop]).to(device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        anchor = F.conv2d(x, kernel, stride=DOWNSAMPLING)
        error = (restored.float() - x).abs().mean() + (restored.float() - x).square().mean()
        return error + 1e-6 * posterior.kl().mean() + 0.02 * (posterior.mean.float() - anchor).square().mean()

    return run_stage("vae", stage, vae, loss_of, folder)


@torch.no_grad()
def narrow_posterior(vae: AutoencoderKL) -> None:
    """Give the encoder no width: the diffusion learns its means, and so should whoever trains on it.

    Otherwise channels that the decoder came to ignore would be drawn with unit noise, which the UNet has never seen.
    """
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0  # the second half of the channels is the log variance
    vae.quant_conv.bias[LATENT_CHANNELS:] = -20


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: torch.device, batch: int = 128) -> Tensor:
    """Mean latents (n, 8, 16, 16) of images (n, 64, 64, 3), not yet scaled."""
    means = []
    for chunk in ProgressBar(images.split(batch), "encoding images", unit="batches", mininterval=10):
        with autocast(device):
            means.append(vae.encode(as_signal(chunk).to(device)).latent_dist.mean.float().cpu())
    return torch.cat(means)


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """The prediction (n, 8, 16, 16) for noisy latents of that shape, timesteps (n,) and token ids (n, tokens)."""
        states = self.text_encoder(input_ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, states).sample
        return prediction


def train_denoiser(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: list[Caption],
    stage: Stage,
    folder: Path,
    device: torch.device,
    ema_decay: float = 0.999,
) -> tuple[Denoiser, list[float]]:
    """Train on v-prediction and give back the moving average of the weights, and the losses.

    The error of the clean latents weighs min(SNR + 1, 10), which for v is min(SNR + 1, 10) / (SNR + 1): min-SNR (Hang
    et al., arXiv 2303.09556) shifted by one, so that the noisiest steps still teach under zero terminal SNR. Timesteps
    are squares of uniform numbers: on 16x16 latents shapes and patterns are decided in the first third of the schedule,
    scene and color in the rest. One caption in ten is empty, for classifier-free guidance.
    """
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    weights = (1 / (1 - alphas).clamp(min=1e-8)).clamp(max=10) * (1 - alphas)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    average_path = folder / "average.pt"
    if average_path.exists():
        average.load_state_dict(torch.load(average_path, weights_only=True))

    def loss_of(step: int) -> Tensor:
        if step:
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
        if step % CHECKPOINT_STEPS == 0:
            with new_file(average_path) as file, file.open("wb") as opened:
                torch.save(average.state_dict(), opened)
        rng = np.random.default_rng([stage.seed, step])
        index = torch.randint(len(latents), (stage.batch_size,))
        texts = ["" if rng.random() < 0.1 else str(shorten(captions[i], rng)) for i in index.tolist()]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        clean = latents[index].to(device)
        noise = torch.randn_like(clean)
        timesteps = (torch.rand(stage.batch_size, device=device).square() * len(alphas)).long()
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            prediction = denoiser(noisy, timesteps, ids)
        target = scheduler.get_velocity(clean, noise, timesteps)
        errors = (prediction.float() - target).square().mean((1, 2, 3))
        return (errors * weights.to(device)[timesteps]).mean()

    losses = run_stage("denoiser", stage, denoiser, loss_of, folder)
    return average.eval(), losses


def cached_world(
    folder: Path, count: int, seed: int, render: Callable[[int, int], tuple[NDArray[np.uint8], list[Caption]]]
) -> tuple[Tensor, list[Caption]]:
    """Images (n, 64, 64, 3) of the base world and their captions, drawn once and kept in the folder.

    They are drawn anew where the first ones are not what the renderer draws today.
    """
    path = folder / f"world-{seed}-{count}.npy"
    first = render(min(count, 32), seed)[0]
    if not path.exists() or not np.array_equal(np.load(path, mmap_mode="r")[: len(first)], first):
        with new_file(path) as file, file.open("wb") as opened:
            np.save(opened, render(count, seed)[0])
    return torch.from_numpy(np.load(path)), [caption_of(index, seed)[0] for index in range(count)]


def make_base(
    folder: Path,
    output: Path,
    world: tuple[Tensor, list[Caption]],
    vae_stage: Stage,
    stage: Stage,
    device: torch.device,
    start_from: Path | None = None,
) -> dict[str, list[float]]:
    """Train autoencoder, text encoder and UNet and save them as a pipeline in half precision.

    Args:
        folder: where checkpoints go.
        output: folder of the pipeline.
        world: images (n, 64, 64, 3) of bytes and their captions.
        vae_stage: length and speed of the autoencoder's training.
        stage: the same for text encoder and UNet.
        device: where to train.
        start_from: a pipeline folder whose encoder is kept and whose decoder, text encoder and UNet are trained on.

    Returns:
        The losses of each stage.
    """
    images, captions = world
    torch.manual_seed(stage.seed)
    losses: dict[str, list[float]] = {}
    if start_from is None:
        vae, tokenizer = build_vae(), build_tokenizer()
        text_encoder, unet = build_text_encoder(tokenizer), build_unet()
        vae.to(device, memory_format=torch.channels_last)
        losses["vae"] = train_vae(vae, images, vae_stage, folder, device)
        narrow_posterior(vae)
        latents = encode(vae, images, device)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    else:
        start = StableDiffusionPipeline.from_pretrained(start_from)
        vae, tokenizer, text_encoder, unet = start.vae, start.tokenizer, start.text_encoder, start.unet
        unet.set_attn_processor(AttnProcessor())
        vae.to(device, memory_format=torch.channels_last)
        if vae_stage.steps:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
            losses["vae"] = train_vae(vae, images, vae_stage, folder, device)
        latents = encode(vae, images, device)
    denoiser = Denoiser(text_encoder, unet).to(device)
    denoiser.unet.to(memory_format=torch.channels_last)
    scaled = latents * vae.config.scaling_factor
    average, losses["denoiser"] = train_denoiser(denoiser, tokenizer, scaled, captions, stage, folder, device)
    tokenizer.backend_tokenizer.no_padding()  # else its file would keep what the last batch asked for
    tokenizer.backend_tokenizer.no_truncation()
    pipe = assemble(vae, tokenizer, average.text_encoder, average.unet)
    pipe.to("cpu", memory_format=torch.contiguous_format)
    for part in (pipe.vae, pipe.unet):  # not the text encoder: it would be loaded in half, the others in float32
        part.half()
    write_pipeline(pipe, output)
    return losses
