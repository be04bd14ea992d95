"""How the samples of a mixed batch lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor


@dataclass
class BatchLayout:
    """How the samples of a mixed batch lie in a tensor: (groups, samples, images), a sample's images side by side."""

    samples: int
    """Samples, each with adapters of its own."""
    images: int = 1
    """Images a sample; the rest of a tensor's first axis are groups, such as the two of classifier-free guidance."""

    def split(self, x: Tensor) -> Tensor:
        """(groups * samples * images, ...) -> (samples, groups * images, ...)."""
        if len(x) % (self.samples * self.images):
            raise ValueError(
                f"found a tensor of {len(x)} in a mixed batch of {self.samples} samples with {self.images} image(s) "
                "each; give one prompt a sample"
            )
        return rearrange(x, "(g r n) ... -> r (g n) ...", r=self.samples, n=self.images)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return rearrange(x, "r (g n) ... -> (g r n) ...", n=self.images)
