"""What a VAE says of pictures, computed once, and what a step draws from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from atomdiff.data.crops import View
from atomdiff.data.masks import latent_weights
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_model, hash_values
from atomdiff.utils.tensor_cache import DiskCache, Tensors


@dataclass(frozen=True)
class Latents:
    """Latents of some views and what belongs to each."""

    latents: Tensor
    """Clean latents (batch, c, h, w), in the scale that the UNet works in."""
    time_ids: Tensor
    """Sizes and crop that SDXL is told of (batch, 6), float32, in pixels; `View` says which."""
    weights: Tensor | None
    """Loss weights (batch, 1, h, w) where losses are masked."""


@dataclass(frozen=True)
class LatentCache:
    """What the VAE says of every view of a set of pictures; a step draws a view and then latents from it.

    `mean` and `std` have shape (views, c, h, w), in the scale that the UNet works in, `time_ids` and `weights` are as
    in `Latents`; the views of picture `i` are the rows from `starts[i]` to `starts[i + 1]`.
    """

    mean: Tensor
    std: Tensor
    time_ids: Tensor
    weights: Tensor | None
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def draw(self, pictures: Sequence[int], generator: torch.Generator) -> Latents:
        """Draw latents on the CPU of a random view of each of `pictures`."""
        share = torch.rand(len(pictures), generator=generator).tolist()
        rows = [
            self.starts[i] + int(part * (self.starts[i + 1] - self.starts[i]))
            for i, part in zip(pictures, share, strict=True)
        ]
        mean = self.mean[rows]
        latents = mean + self.std[rows] * torch.randn(mean.shape, generator=generator)
        return Latents(latents, self.time_ids[rows], None if self.weights is None else self.weights[rows])


def join(caches: Sequence[LatentCache]) -> LatentCache:
    """Put the pictures of several caches, all of one size, into one."""
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
class Encoder:
    """Encodes pictures with a VAE, on its device and in its dtype, unless a disk cache knows the result."""

    vae: AutoencoderKL
    batch_size: int
    """Most views encoded together."""
    cache: DiskCache
    unmasked_weight: float | None = None
    """Loss weight of what the masks leave out; None for no masks."""

    @cached_property
    def _vae_key(self) -> str:
        return hash_model(self.vae)

    def __call__(self, views: Sequence[View]) -> LatentCache:
        """Encode the views of one picture.

        The result is kept by the pixels of the views and the VAE; it does not depend on other pictures.

        Raises:
            UserError: The VAE's numbers are not finite, or the cache cannot be written.
        """
        pixels = np.stack([np.asarray(view.picture) for view in views])  # (views, height, width, 3)
        together = min(self.batch_size, len(views))
        key = hash_values("latents", self._vae_key, together, repr(pixels.shape), pixels.tobytes())
        found = self.cache.get(key, lambda: self._encode(pixels, together))
        weights = None
        if self.unmasked_weight is not None:
            size = (found["mean"].shape[-2], found["mean"].shape[-1])
            weights = latent_weights([view.mask for view in views], size, self.unmasked_weight)
        time_ids = torch.tensor([view.time_ids for view in views], dtype=torch.float32)
        return LatentCache(found["mean"], found["std"], time_ids, weights, (0, len(views)))

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray, together: int) -> Tensors:
        """Return mean and std (views, c, h, w) for pixels (views, height, width, 3)."""
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
            raise UserError(f"the base's VAE gives numbers that are not finite in {self.vae.dtype}; use another VAE")
        return {"mean": mean, "std": std}
