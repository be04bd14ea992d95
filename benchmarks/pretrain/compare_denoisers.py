"""Ways to train the UNet in fewer hours, in short trials one after another on a CPU.

    python -m benchmarks.pretrain.compare_denoisers --weights out/base2 --unet out/pretrain --world out/base2/world.pt \
        --out out/denoisers

Each trial starts from the same text encoder, sees the same images and ends with the learning rate at its lowest. The
figure is the loss (see `train_denoiser.make_loss`) of 512 images that were not trained on, with the same noise for all.
A trial that is in the result file is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.utils.versions import versions
from benchmarks.pretrain.architecture import build_text_encoder, build_tokenizer, build_unet, build_vae
from benchmarks.pretrain.data import World, render_world, token_ids
from benchmarks.pretrain.stage import Phase, Stage, run_stage
from benchmarks.pretrain.train import kept, load_what_fits
from benchmarks.pretrain.train_autoencoder import encode
from benchmarks.pretrain.train_denoiser import Denoiser, make_loss
from benchmarks.pretrain.weights import load_weights

_UNSEEN = 512
TRIALS: dict[str, dict[str, Any]] = {  # how each differs from the first
    "plain": {},
    "warm": {"warm": True},
    "rate x2": {"rate": 2.0},
    "batch / 2": {"batch": 0.5, "steps": 2.0},
}


def make_denoiser(text_encoder: dict[str, Tensor], unet: dict[str, Tensor] | None) -> Denoiser:
    """A denoiser with these weights of its text encoder and those of the UNet's that fit."""
    torch.manual_seed(0)
    denoiser = Denoiser(build_text_encoder(build_tokenizer()), build_unet())
    denoiser.text_encoder.load_state_dict(text_encoder)
    if unet is not None:
        load_what_fits("unet", denoiser.unet, unet)
    denoiser.move_to(torch.device("cpu"))
    return denoiser


@dataclass
class Images:
    """Images as the UNet sees them: scaled latents (n, 16, 16, 16), masks (n, 1, 16, 16), token ids (n + 1, tokens)."""

    latents: Tensor
    masks: Tensor
    ids: Tensor


def run_trial(
    name: str, denoiser: Denoiser, seen: Images, unseen: Images, options: argparse.Namespace
) -> dict[str, Any]:
    """Train the denoiser as the trial says, and measure its loss on unseen images."""
    change = TRIALS[name]
    batch, steps = (round(getattr(options, key) * change.get(key, 1.0)) for key in ("batch", "steps"))
    stage = Stage(name, 0.0, options.learning_rate * change.get("rate", 1.0), warmup=0.1, total_steps=steps)
    begin = time.perf_counter()
    run_stage(stage, denoiser, [Phase(make_loss(denoiser, **vars(seen), batch=batch))])
    seconds = round(time.perf_counter() - begin)
    loss_of = make_loss(denoiser, **vars(unseen), batch=_UNSEEN // 4)
    torch.manual_seed(12345)
    with torch.no_grad():
        loss = sum(loss_of().item() for _ in range(16)) / 16
    return {"loss": round(loss, 4), "steps": steps, "batch": batch, "seconds": seconds, "losses": stage.losses}


def main() -> None:
    """Parse, run the trials that are missing, write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights, with a trained autoencoder")
    parser.add_argument("--unet", type=Path, required=True, help="folder of weights whose UNet `warm` begins with")
    parser.add_argument("--world", type=Path, required=True, help="file of rendered images, see `train`")
    parser.add_argument("--out", type=Path, required=True, help="folder for latents")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/pretrain_denoisers.json"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    states, scale = load_weights(options.weights)
    warm = load_weights(options.unet)[0]["unet"]
    vae = build_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(states["vae"])
    device, tokenizer = torch.device("cpu"), build_tokenizer()

    def images_of(world: World, latents: Tensor) -> Images:
        return Images(latents, world.masks, token_ids(tokenizer, world.texts, device))

    world = World(**torch.load(options.world, mmap=True, weights_only=True))
    unseen = render_world(_UNSEEN, 600, 7, device, batch=128)
    latents = kept(options.out / "latents.pt", lambda: encode(vae, world.images, 128) * scale)
    images = images_of(world, latents), images_of(unseen, encode(vae, unseen.images, 128) * scale)
    result: dict[str, Any] = {"figures": {}}
    if options.output.exists():
        result = json.loads(options.output.read_text())
    for name in [name for name in options.trials if name not in result["figures"]]:
        denoiser = make_denoiser(states["text_encoder"], warm if TRIALS[name].get("warm") else None)
        result["figures"][name] = run_trial(name, denoiser, *images, options)
        settings = {"steps": options.steps, "batch": options.batch, "learning_rate": options.learning_rate}
        result |= {"date": date.today().isoformat(), "versions": versions(), "settings": settings}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        print(name, result["figures"][name], flush=True)


if __name__ == "__main__":
    main()
