"""How good the toybox's base is: what its pictures show, against what their captions asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from atomdiff.sampling.generate import generate
from atomdiff.toybox.dataset import render_world
from atomdiff.toybox.judge import LABELS, Judge
from atomdiff.toybox.pretrain import as_signal
from atomdiff.toybox.pretrain_judge import word_of
from atomdiff.toybox.scenes import Caption


@torch.no_grad()
def reconstruction_psnr(pipe: StableDiffusionPipeline, pictures: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures (n, 64, 64, 3) of bytes through the autoencoder."""
    ratios = []
    for chunk in as_signal(pictures).to(pipe.device, pipe.vae.dtype).split(64):
        restored = pipe.vae.decode(pipe.vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (restored - chunk).square().mean((1, 2, 3))))
    return torch.cat(ratios).mean().item()


def accuracy(judge: Judge, images: list[Image.Image], captions: list[Caption]) -> dict[str, float]:
    """Share of pictures in which the judge sees the caption's word, for class, scene, colour and pattern."""
    seen = judge.classify(images)
    return {
        kind: float(np.mean([word == word_of(caption, kind) for word, caption in zip(words, captions, strict=True)]))
        for kind, words in seen.items()
    }


def evaluate_base(
    pipe: StableDiffusionPipeline,
    judge: Judge,
    *,
    count: int = 256,
    num_inference_steps: int = 30,
    guidance_scale: float = 4.0,
    seed: int = 1_000_003,
) -> tuple[dict[str, Any], list[Image.Image], list[Caption]]:
    """Generate pictures for `count` captions whose combination of words pretraining never saw, and judge them.

    Returns:
        Figures (PSNR in dB; accuracies on generated and on freshly drawn pictures, and their ratio), the generated
        pictures, their captions.
    """
    drawn, captions = render_world(count, seed, held_out=True)
    real = accuracy(judge, [Image.fromarray(picture) for picture in drawn], captions)
    prompts = [str(caption) for caption in captions]
    images = generate(
        pipe,
        prompts,
        seeds=[seed + i for i in range(count)],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=32,
    )
    generated = accuracy(judge, images, captions)
    figures = {
        "psnr_db": round(reconstruction_psnr(pipe, torch.from_numpy(drawn)), 2),
        "real": real,
        "generated": generated,
        "generated_over_real": {kind: round(generated[kind] / real[kind], 4) for kind in LABELS},
    }
    return figures, images, captions
