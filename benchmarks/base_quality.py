"""How near the images of a base come to those it learned from: words, Frechet distance, sharpness, reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from atomdiff.evaluate.label_accuracy import hits
from atomdiff.toybox.judge import Judge

_TOP, _BOTTOM, _LEFT, _RIGHT = 0.4, 0.8, 0.3, 0.7  # of the image: the middle of an object in every view


def accuracies(judge: Judge, images: list[Image.Image], words: Mapping[str, Sequence[str | None]]) -> dict[str, float]:
    """Share of images in which the judge sees the caption's word, by kind of label."""
    return {kind: float(hits(seen, words[kind]).mean()) for kind, seen in judge.classify(images).items()}


@torch.no_grad()
def restore(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] through an autoencoder."""
    restored = [
        vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in (images * 2 - 1).to(vae.dtype).split(32)
    ]
    return (torch.cat(restored).float().clamp(-1, 1) + 1) / 2


def psnr(images: Tensor, restored: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of images (n, 3, h, w) in [0, 1]."""
    return float((-10 * (images - restored).square().mean((1, 2, 3)).log10()).mean())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to embeddings (n, e) and (m, e).

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", arXiv
    1706.08500, eq. 6.
    """
    (mean_1, cov_1), (mean_2, cov_2) = ((each.mean(0), each.T.cov()) for each in (first.double(), second.double()))
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * product)


def relative_frechet_distance(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Distance of generated embeddings (n, e) from the first n real ones (2n, e), and over that between the two halves.

    Raises:
        ValueError: there are not twice as many real embeddings as generated ones: the distance depends on their number.
    """
    if len(real) != 2 * len(generated):
        raise ValueError(f"expected {2 * len(generated)} real embeddings, found {len(real)}")
    half, other = real.chunk(2)
    distance, floor = frechet_distance(generated, half), frechet_distance(other, half)
    return {"frechet": distance, "frechet_real": floor, "frechet_over_real": distance / floor}


def sharpness(images: Sequence[Image.Image]) -> float:
    """Mean length of the brightness gradient, in gray levels a pixel, in the middle of the objects.

    No mask of a generated object is known, so all images are measured in the same box, which objects fill.
    """
    gray = torch.from_numpy(np.stack([np.asarray(image.convert("L"), np.float32) for image in images]))  # (n, h, w)
    height, width = gray.shape[1:]
    rows, columns = (round(_TOP * height), round(_BOTTOM * height)), (round(_LEFT * width), round(_RIGHT * width))
    box = gray[:, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
    down, right = box.diff(dim=1)[:, :, :-1], box.diff(dim=2)[:, :-1]
    return float(torch.hypot(down, right).mean())
