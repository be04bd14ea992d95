"""A mixed batch in one layer: how its samples lie in a tensor, and the call with a weight for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.func import vmap

from atomdiff.atoms import im2col
from atomdiff.atoms.batched import adapt_in_turn, adapt_weight_per_sample, can_adapt_in_turn
from atomdiff.atoms.update import WeightUpdate
from atomdiff.utils import functional_call
from atomdiff.utils.functional_call import without_autocast


@dataclass
class BatchLayout:
    """How the samples of a mixed batch lie in a tensor: (groups, samples, images), a sample's images side by side."""

    samples: int
    """Samples, each with adapters of its own."""
    images: int | None = 1
    """Images a sample; the rest of a tensor's first axis are groups, such as the two of classifier-free guidance. None:
    there are no groups, and each tensor has images (or windows of an image) as many as it may have."""

    def apart(self, x: Tensor) -> Tensor:
        """(groups * samples * images, ...) -> (groups, samples, images, ...), the same memory."""
        if len(x) % (self.samples * (self.images or 1)):
            raise ValueError(
                f"found a tensor of {len(x)} in a mixed batch of {self.samples} samples with {self.images or 1} "
                "image(s) each; give one prompt a sample"
            )
        return x.unflatten(0, (-1, self.samples, self.images or len(x) // self.samples))

    def split(self, x: Tensor) -> Tensor:
        """(groups * samples * images, ...) -> (samples, groups * images, ...)."""
        return rearrange(self.apart(x), "g r n ... -> r (g n) ...")

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return rearrange(x, "r (g n) ... -> (g r n) ...", n=self.images or x.shape[1])


@dataclass(frozen=True)
class MixedBatch:
    """What a layer computes with while each sample of a batch has adapters of its own."""

    layout: BatchLayout
    """How the samples lie in a tensor."""
    updates: list[WeightUpdate]
    """Updates of the layer's weight, with a leading axis of samples."""

    def adapt(self, weight: Tensor) -> Tensor:
        """A weight for each sample: (out, in/groups, ...) -> (samples, out, in/groups, ...)."""
        with without_autocast(weight):
            return adapt_weight_per_sample(weight, self._updates_beside(weight))

    def _updates_beside(self, weight: Tensor) -> list[WeightUpdate]:
        """The updates on the device of the weight, which offloading may move after the batch was opened."""
        return [update.to(weight.device) for update in self.updates]

    def run(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
        """The output of a function of x and a weight, with each sample's own weight; all share one product."""
        return self.layout.join(vmap(call)(self.layout.split(x), weights))

    def call(self, module: Any, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a module that `functional_call.is_plain`, given its weight without adapters."""

        def call(x: Tensor, weight: Tensor) -> Tensor:
            return functional_call.call(module, weight, module.bias, x, *args, **kwargs)

        if not self.updates:
            return call(x, weight)
        positions = x.numel() // (x.shape[1] * self.layout.samples)
        if not (args or kwargs) and im2col.im2col_is_cheaper(module, self.updates, positions):
            updates = self._updates_beside(weight)
            return self.layout.join(im2col.convolve(module, weight, updates, self.layout.split(x)))
        if can_adapt_in_turn(weight, self.updates):
            return self._run_in_turn(call, x, adapt_in_turn(weight, self._updates_beside(weight)))
        return self.run(call, x, self.adapt(weight))

    def _run_in_turn(self, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Iterable[Tensor]) -> Tensor:
        """What `run` gives, one sample after another: on a CPU faster, and with the memory of one weight."""
        samples = self.layout.apart(x).unbind(1)
        outputs = [
            call(own.flatten(0, 1), adapted).unflatten(0, own.shape[:2])  # (groups, images, ...)
            for own, adapted in zip(samples, weights, strict=True)
        ]
        return torch.stack(outputs, dim=1).flatten(0, 2)
