"""Measure the toybox's base: reconstruction, whether images show what unseen captions ask for, and how good they look.

python -m benchmarks.toybox.evaluate
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from atomdiff.sampling.generate import generate
from atomdiff.toybox.base import load_toybox
from atomdiff.toybox.judge import LABELS, ImageJudge, load_judge
from atomdiff.toybox.scenes import Caption
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.base_quality import relative_frechet_distance, sharpness
from benchmarks.result_file import command_line, write_result
from benchmarks.toybox.data import render_world
from benchmarks.toybox.train_base import as_signal
from benchmarks.toybox.train_judge import word_of


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    pretrained_model_name_or_path: str = "samples/toybox-sd"
    """The base."""
    judge: str = "samples/toybox-judge"
    """Folder of the judge."""
    count: int = 256
    """Number of captions, of combinations that pretraining never saw. The Frechet distance depends on it."""
    num_inference_steps: int = 30
    """Denoising steps."""
    batch_size: int = 32
    """Images generated at once."""
    guidance_scale: float = 4.0
    """Classifier-free guidance."""
    output: str = "benchmarks/results/toybox.json"
    """The result file; a sheet of the first images is written to the folder out."""


@torch.no_grad()
def reconstruction_psnr(pipe: StableDiffusionPipeline, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of images (n, 64, 64, 3) of bytes through the autoencoder."""
    ratios = []
    for chunk in as_signal(images).to(pipe.device, pipe.vae.dtype).split(64):
        restored = pipe.vae.decode(pipe.vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (restored - chunk).square().mean((1, 2, 3))))
    return torch.cat(ratios).mean().item()


def accuracy(judge: ImageJudge, images: list[Image.Image], captions: list[Caption]) -> dict[str, float]:
    """Share of images in which the judge sees the caption's word, for class, scene, color and pattern."""
    seen = judge.classify(images)
    return {
        kind: float(np.mean([word == word_of(caption, kind) for word, caption in zip(words, captions, strict=True)]))
        for kind, words in seen.items()
    }


def evaluate_base(
    pipe: StableDiffusionPipeline,
    judge: ImageJudge,
    *,
    count: int = 256,
    num_inference_steps: int = 30,
    guidance_scale: float = 4.0,
    batch_size: int = 32,
    seed: int = 1_000_003,
) -> tuple[dict[str, Any], list[Image.Image], list[Caption]]:
    """Generate images for `count` captions whose combination of words pretraining never saw, and judge them.

    Returns:
        Figures (PSNR in dB; sharpness and Frechet distance; accuracies on generated and on real images, and their
        ratio), the generated images, their captions.
    """
    rendered, all_captions = render_world(2 * count, seed, held_out=True)
    real_images, captions = [Image.fromarray(image) for image in rendered], all_captions[:count]
    real = accuracy(judge, real_images, all_captions)
    prompts = [str(caption) for caption in captions]
    images = generate(
        pipe,
        prompts,
        seeds=[seed + i for i in range(count)],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    generated = accuracy(judge, images, captions)
    figures = {
        "psnr_db": round(reconstruction_psnr(pipe, torch.from_numpy(rendered[:count])), 2),
        "sharpness_over_real": round(sharpness(images) / sharpness(real_images), 4),
        **relative_frechet_distance(judge.embed(images), judge.embed(real_images)),
        "real": real,
        "generated": generated,
        "generated_over_real": {kind: round(generated[kind] / real[kind], 4) for kind in LABELS},
    }
    return figures, images, captions


def main(config: EvaluateConfig) -> None:
    """Measure, print, store."""
    quiet_libraries()
    pipe = load_toybox(config.pretrained_model_name_or_path)
    figures, images, captions = evaluate_base(
        pipe,
        load_judge(config.judge),
        count=config.count,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
    )
    accuracies = {name: figures.pop(name) for name in ("real", "generated", "generated_over_real")}
    figures |= {f"{source}_{kind}": share for source, kinds in accuracies.items() for kind, share in kinds.items()}
    write_result(config.output, command_line("toybox.evaluate", config), figures)
    Path("out").mkdir(exist_ok=True)
    rows = [images[i : i + 8] for i in range(0, min(len(images), 48), 8)]
    make_image_grid(rows, [str(caption) for caption in captions[: len(rows) * 8 : 8]]).save("out/toybox.png")


if __name__ == "__main__":
    main(parse_config(EvaluateConfig))
