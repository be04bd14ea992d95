"""AdamW and Muon on the autoencoder, side by side on the CPU: what each reaches in the same steps on the same crops.

    python -m benchmarks.pretrain.compare_optimizers

Both start from the same weights and see the same crops of 64 pixels, without the judge's features. The figure is the
mean PSNR of 64 whole images that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from atomdiff.toybox.world import IMAGE_SIZE
from atomdiff.utils.versions import versions
from benchmarks.pretrain.architecture import build_vae
from benchmarks.pretrain.data import as_signal, render_world
from benchmarks.pretrain.muon import make_optimizers
from benchmarks.pretrain.stage import rate_at
from benchmarks.pretrain.train_autoencoder import edge_error

_UNSEEN, _SIDE, _RATE = 64, IMAGE_SIZE // 2, 1e-3


def train(kind: str, images: Tensor, steps: int, batch: int) -> dict[str, float]:
    """Train a new autoencoder on images (n, 3, 128, 128) of bytes, the last ones left out; gives PSNR and seconds."""
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    if kind == "muon":
        optimizers = make_optimizers(vae, _RATE, 0.01)
    else:
        optimizers = [torch.optim.AdamW(vae.parameters(), _RATE, betas=(0.9, 0.99), weight_decay=0.01)]
    begin = time.perf_counter()
    for step in range(steps):
        index = torch.randint(len(images) - _UNSEEN, (batch,))
        top, left = torch.randint(IMAGE_SIZE - _SIDE + 1, (2,)).tolist()
        x = as_signal(images[index, :, top : top + _SIDE, left : left + _SIDE])
        restored = vae.decode(vae.encode(x).latent_dist.mean).sample
        loss = (restored - x).abs().mean() + (restored - x).square().mean() + edge_error(restored, x)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _RATE * max(rate_at(step / steps, 0.05), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        x = as_signal(images[-_UNSEEN:])
        restored = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(16)])
        error = (restored.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
    return {"psnr_db": round(-10 * error.log10().mean().item(), 2), "seconds": round(seconds, 1)}


def main() -> None:
    """Parse, train with both, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12, help="crops a step")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/pretrain_optimizers.json"))
    options = parser.parse_args()
    images = render_world(options.images, 600, 3, torch.device("cpu"), batch=200).images
    figures = {kind: train(kind, images, options.steps, options.batch) for kind in ("adamw", "muon")}
    settings = {"steps": options.steps, "batch": options.batch, "images": len(images), "learning_rate": _RATE}
    result = {"date": date.today().isoformat(), "versions": versions(), "settings": settings, "figures": figures}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
