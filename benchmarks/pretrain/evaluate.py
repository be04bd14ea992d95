"""Measure the toybox's base and judge: autoencoder, individuals, and how well and how sharply captions are painted.

    python -m benchmarks.pretrain.evaluate

`README.md` has the goals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from atomdiff.evaluate.similarity import mean_pairwise_similarity
from atomdiff.sampling.generate import generate
from atomdiff.toybox.base import load_toybox
from atomdiff.toybox.judge import LABELS, Judge, load_judge
from atomdiff.toybox.world import SUBJECTS, subject_images, to_images
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.base_quality import accuracies, psnr, relative_frechet_distance, restore, sharpness
from benchmarks.pretrain.architecture import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from benchmarks.pretrain.data import as_signal, render_families, render_world
from benchmarks.result_file import command_line, write_result

_SEED = 1_000_003
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    pretrained_model_name_or_path: str = "samples/toybox-sd"
    """The base."""
    judge: str = "samples/toybox-judge"
    """Folder of the judge."""
    count: int = 2000
    """Number of captions, of combinations that pretraining never saw; 0: judge and autoencoder alone."""
    families: int = 128
    """Individuals, each with three relatives, that the judge has to tell apart."""
    restored: int = 256
    """Images that the autoencoder restores."""
    num_inference_steps: int = NUM_INFERENCE_STEPS
    """Denoising steps of DPM-Solver++."""
    guidance_scale: float = GUIDANCE_SCALE
    """Classifier-free guidance."""
    batch_size: int = 32
    """Images generated at once."""
    output: str = "benchmarks/results/pretrain.json"
    """The result file; a sheet of the first images is written beside it."""


def area_under_curve(same: Tensor, different: Tensor) -> float:
    """Probability that a pair of the same individual is more alike than one of two, a tie counting half."""
    ordered = different.sort().values
    below = torch.cat([torch.searchsorted(ordered, same, right=right) for right in (False, True)])
    return float(below.double().mean()) / len(different)


@torch.no_grad()
def measure_judge(judge: Judge, families: Tensor) -> dict[str, float]:
    """How well the judge tells individuals from relatives that differ in shape, pattern or colors alone.

    Args:
        judge: the judge.
        families: (k, 4, views, 3, 128, 128) bytes, see `render_families`.
    """
    views = families.shape[2]
    flat = rearrange(families, "k r v c h w -> (k r v) c h w")
    vectors = torch.cat([judge.look(as_signal(chunk))[1] for chunk in flat.split(64)])
    vectors = rearrange(vectors, "(k r v) e -> k r v e", r=4, v=views)
    above = torch.triu_indices(views, views, 1)
    within = torch.einsum("krve,krwe->krvw", vectors, vectors)[..., above[0], above[1]]  # (k, 4, pairs)
    figures = {}
    for relative, name in enumerate(("shape", "pattern", "colors"), start=1):
        across = torch.einsum("kve,kwe->kvw", vectors[:, 0], vectors[:, relative])
        figures[f"judge_auc_{name}"] = area_under_curve(within[:, [0, relative]].flatten(), across.flatten())
    return figures


def measure_autoencoder(vae: AutoencoderKL, judge: Judge, unseen: Tensor) -> dict[str, float]:
    """PSNR of unseen images (n, 3, 128, 128) in [0, 1] and of the subjects, and what the judge still recognizes.

    `similarity_kept` is the similarity of a subject's restored images to its other images, over that of the images
    among each other; the least of all subjects, and the median.
    """
    kept, ratios = [], []
    for name in SUBJECTS:
        images = subject_images(name, unseen=True)[0].images
        restored = restore(vae, images)
        ratios.append(psnr(images, restored))
        real, ours = judge.embed(to_images(images)), judge.embed(to_images(restored))
        other = ~torch.eye(len(real), dtype=torch.bool)
        kept.append(float((ours @ real.T)[other].mean()) / mean_pairwise_similarity(real))
    restored = restore(vae, unseen)
    return {
        "psnr_unseen": psnr(unseen, restored),
        "psnr_subjects": sum(ratios) / len(ratios),
        "similarity_kept_least": min(kept),
        "similarity_kept_median": float(torch.tensor(kept).median()),
        "sharpness_restored": sharpness(to_images(restored)) / sharpness(to_images(unseen)),
    }


def main(config: EvaluateConfig) -> None:
    """Measure, print, store."""
    quiet_libraries()
    judge, pipe = load_judge(config.judge), load_toybox(config.pretrained_model_name_or_path)
    figures = measure_judge(judge, render_families(config.families, 1e9, _SEED, _CPU, batch=32))
    real = render_world(max(2 * config.count, config.restored), 1e9, _SEED, _CPU, batch=128, held_out=True)
    figures |= measure_autoencoder(pipe.vae, judge, real.images[: config.restored] / 255)
    if config.count:
        prompts = real.texts[: config.count]
        images = generate(
            pipe,
            prompts,
            seeds=range(_SEED, _SEED + config.count),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
        )
        real_images = to_images(real.images[: 2 * config.count] / 255)
        figures["sharpness_over_real"] = sharpness(images) / sharpness(real_images)
        figures |= relative_frechet_distance(judge.embed(images), judge.embed(real_images))
        for source, some in {"real": real_images, "generated": images}.items():
            words = {kind: [LABELS[kind][i] for i in known[: len(some)]] for kind, known in real.labels.items()}
            figures |= {f"{source}_{kind}": share for kind, share in accuracies(judge, some, words).items()}
        rows = [images[i : i + 8] for i in range(0, min(len(images), 48), 8)]
        make_image_grid(rows, prompts[: len(rows) * 8 : 8]).save(Path(config.output).with_suffix(".png"))
    rounded = {name: round(value, 4) for name, value in figures.items()}
    write_result(config.output, command_line("pretrain.evaluate", config), rounded)


if __name__ == "__main__":
    main(parse_config(EvaluateConfig))
