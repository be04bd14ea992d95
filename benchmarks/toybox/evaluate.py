"""Measure the toybox's base: reconstruction, whether images show what unseen captions ask for, and how good they look.

python -m benchmarks.toybox.evaluate
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from einops import rearrange
from PIL import Image

from atomdiff.sampling.generate import generate
from atomdiff.toybox.base import load_toybox
from atomdiff.toybox.judge import LABELS, ImageJudge, load_judge
from atomdiff.toybox.scenes import Caption
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.base_quality import accuracies, psnr, relative_frechet_distance, restore, sharpness
from benchmarks.result_file import command_line, write_result
from benchmarks.toybox.data import render_world
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


def words_of(captions: list[Caption]) -> dict[str, list[str | None]]:
    """The words of captions, by kind of label."""
    return {kind: [word_of(caption, kind) for caption in captions] for kind in LABELS}


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
    pixels = rearrange(torch.from_numpy(rendered[:count]), "n h w c -> n c h w") / 255
    real = accuracies(judge, real_images, words_of(all_captions))
    prompts = [str(caption) for caption in captions]
    images = generate(
        pipe,
        prompts,
        seeds=[seed + i for i in range(count)],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    generated = accuracies(judge, images, words_of(captions))
    figures = {
        "psnr_db": round(psnr(pixels, restore(pipe.vae, pixels)), 2),
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
