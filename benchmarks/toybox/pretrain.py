"""Pretrain the toybox: the pipeline into `samples/toybox-sd`, the judge into `samples/toybox-judge`.

    python -m benchmarks.toybox.pretrain --work_dir out/pretrain

On a GPU where there is one, else on the CPU; continues from the work folder when it was stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from atomdiff.utils.options import parse_config
from atomdiff.utils.precision import choose_precision, compute_device, log_precision
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.toybox.data import render_world


@dataclass(frozen=True)
class PretrainConfig:
    """Everything the pretraining takes."""

    work_dir: Path = Path("out/pretrain")
    """Folder of the drawn images and the checkpoints."""
    output_dir: Path = Path("samples")
    """Folder that receives `toybox-sd` and `toybox-judge`."""
    images: int = 48_000
    """Number of images of the base world."""
    individuals: int = 3_000
    """Number of individuals, six images each, that the judge learns to tell apart."""
    vae_steps: int = 7_400
    """Steps of the autoencoder, on 8 images or 16 crops each."""
    denoiser_steps: int = 8_000
    """Steps of text encoder and UNet."""
    denoiser_batch_size: int = 24
    """Images in each of those steps."""
    denoiser_learning_rate: float = 1.5e-3
    """Highest learning rate of text encoder and UNet."""
    judge_steps: int = 1_300
    """Steps of the judge, on 64 captioned images and up to 64 of individuals each."""
    start_from: Path | None = None
    """A pipeline folder to train on from. Its encoder is kept, its decoder too with `--vae_steps 0`."""
    seed: int = 1
    """Every random choice follows from it."""
    parts: tuple[str, ...] = ("base", "judge")
    """What to train: `base` (autoencoder, then text encoder and UNet), `judge` or both."""


def main(config: PretrainConfig) -> None:
    """Draw the world, train the parts, save them."""
    quiet_libraries()
    from atomdiff.utils.versions import versions
    from benchmarks.toybox import train_base as p
    from benchmarks.toybox.train_judge import make_judge

    device, output = compute_device(), config.output_dir
    log_precision(choose_precision(None, device), device)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    world = p.cached_world(config.work_dir, config.images, config.seed, render_world)
    losses = {}
    if "base" in config.parts:
        vae = p.Stage(config.vae_steps, 8, 2e-3, config.seed)
        size, rate = config.denoiser_batch_size, config.denoiser_learning_rate
        denoiser = p.Stage(config.denoiser_steps, size, rate, config.seed)
        losses |= p.make_base(config.work_dir, output / "toybox-sd", world, vae, denoiser, device, config.start_from)
    if "judge" in config.parts:
        stage = p.Stage(config.judge_steps, 64, 2e-3, config.seed)
        losses |= make_judge(config.work_dir, output / "toybox-judge", world, config.individuals, stage, device)
    final = {name: float(np.mean(values[-200:])) for name, values in losses.items()}
    report = {"config": asdict(config), "final_losses": final, "versions": versions(), "device": str(device)}
    (config.work_dir / "pretrain.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(*(f"{name}: final loss {loss:.4f}" for name, loss in final.items()), sep="\n")


if __name__ == "__main__":
    main(parse_config(PretrainConfig))
