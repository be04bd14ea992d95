"""The VAE latents of images: encoded once, cached, and sampled in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from atomdiff.data.crops import Crop
from atomdiff.data.masks import loss_weights
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_model, hash_values
from atomdiff.utils.tensor_cache import DiskCache, Tensors


@dataclass(frozen=True)
class Latents:
    """Latents of some crops, and what belongs to each."""

    latents: Tensor
    """Clean latents (batch, c, h, w), in the scale that the UNet works in."""
    time_ids: Tensor
    """SDXL's micro-conditioning (batch, 6), float32, in pixels, as `Crop` has it."""
    weights: Tensor | None
    """Loss weights (batch, 1, h, w) where losses are masked."""


@dataclass(frozen=True)
class LatentCache:
    """Latent distributions of every crop of a set of images; a step samples a crop and then latents of it.

    `mean` and `std` have shape (crops, c, h, w), in the scale that the UNet works in, `time_ids` and `weights` are as
    in `Latents`; the crops of image `i` are those from `starts[i]` to `starts[i + 1]`.
    """

    mean: Tensor
    std: Tensor
    time_ids: Tensor
    weights: Tensor | None
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sample(self, images: Sequence[int], generator: torch.Generator) -> Latents:
        """Sample latents, on the CPU, of a random crop of each of `images` (indices)."""
        share = torch.rand(len(images), generator=generator).tolist()
        chosen = [
            self.starts[i] + int(part * (self.starts[i + 1] - self.starts[i]))
            for i, part in zip(images, share, strict=True)
        ]
        mean = self.mean[chosen]
        latents = mean + self.std[chosen] * torch.randn(mean.shape, generator=generator)
        return Latents(latents, self.time_ids[chosen], None if self.weights is None else self.weights[chosen])


def concatenate(caches: Sequence[LatentCache]) -> LatentCache:
    """Join the caches of several images, all of one size."""
    counts = [end - start for cache in caches for start, end in zip(cache.starts, cache.starts[1:], strict=False)]
    weights = [cache.weights for cache in caches if cache.weights is not None]
    return LatentCache(
        torch.cat([cache.mean for cache in caches]),
        torch.cat([cache.std for cache in caches]),
        torch.cat([cache.time_ids for cache in caches]),
        torch.cat(weights) if weights else None,
        (0, *accumulate(counts)),
    )


@dataclass(frozen=True)
class LatentEncoder:
    """Encodes images with a VAE, on its device and in its dtype, unless a disk cache knows the result."""

    vae: AutoencoderKL
    batch_size: int
    """Most crops encoded together."""
    cache: DiskCache
    unmasked_weight: float | None = None
    """Loss weight where a mask is black; None for no masks."""

    @cached_property
    def _vae_key(self) -> str:
        return hash_model(self.vae)

    def __call__(self, crops: Sequence[Crop]) -> LatentCache:
        """Encode the crops of one image.

        The disk cache knows the result by the pixels of the crops and the VAE; it does not depend on other images.

        Raises:
            UserError: the latents are not finite, or the cache cannot be written.
        """
        pixels = np.stack([np.asarray(crop.image) for crop in crops])  # (crops, height, width, 3)
        together = min(self.batch_size, len(crops))
        key = hash_values("latents", self._vae_key, together, repr(pixels.shape), pixels.tobytes())
        found = self.cache.get(key, lambda: self._encode(pixels, together))
        weights = None
        if self.unmasked_weight is not None:
            size = (found["mean"].shape[-2], found["mean"].shape[-1])
            weights = loss_weights([crop.mask for crop in crops], size, self.unmasked_weight)
        time_ids = torch.tensor([crop.time_ids for crop in crops], dtype=torch.float32)
        return LatentCache(found["mean"], found["std"], time_ids, weights, (0, len(crops)))

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray, together: int) -> Tensors:
        """Return mean and std (crops, c, h, w) for pixels (crops, height, width, 3)."""
        parts: Iterable[Tensor] = torch.from_numpy(pixels).split(together)
        means, stds = [], []
        for part in parts:
            images = part.permute(0, 3, 1, 2).to(self.vae.device, self.vae.dtype) / 127.5 - 1  # (batch, 3, h, w)
            found = self.vae.encode(images).latent_dist
            means.append(found.mean.float().cpu())
            stds.append(found.std.float().cpu())
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor
        mean, std = (torch.cat(means) - shift) * scale, torch.cat(stds) * scale
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise UserError(f"the base's VAE gives latents that are not finite in {self.vae.dtype}; use another VAE")
        return {"mean": mean, "std": std}
