"""The adapter layer: any supported module, called with an adapted weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from atomdiff.atoms import autograd
from atomdiff.atoms.merge import adapt_weight, sum_by_view
from atomdiff.tuner import weight_access
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.layer_adapters import LayerAdapters, projections
from atomdiff.tuner.mixed_batch import BatchLayout, MixedBatch
from atomdiff.utils import functional_call
from atomdiff.utils.functional_call import without_autocast
from atomdiff.utils.threads import ThreadLocal


class AtomLayer(LayerAdapters):
    """A module whose weight W is adapted (arXiv 2403.00269): each block B of it becomes (I + C).T @ B @ (I + S).

    S = D.T @ dD mixes kernel positions, or whole blocks with `joint`, or those of each input channel in its own way
    with `recursion`; C = Dc.T @ dDc mixes channels within a block. With the basis `sparse`, A @ dD is added to the rows
    of W instead, A being their code. Several active adapters add their S and their C, each times its weight, before W
    is touched. The forward pass is the base module's own with the adapted weight, so stride, padding, dilation and
    groups are the base's.

    Merging writes into the base weight's own memory, always starting from the base weight, which is kept aside (by
    default beside it: the memory of one more weight) and which unmerging copies back.

    Args:
        base_layer: the module to adapt, possibly wrapped by layers of other PEFT methods already.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._mixed = ThreadLocal()  # while it mixes a batch
        self._set_written(None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the adapted weight where adapters are active."""
        if (mixed := self.mixed_batch) is not None:
            return self._forward_mixed(mixed, x, *args, **kwargs)
        if self.disable_adapters:
            self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.holds_merged:  # no look at names: compiled code outlives a switch
            return self.base_layer(x, *args, **kwargs)
        weights = {name: self.scaling[name] for name in self.active_adapters if self.scaling.get(name)}
        base: Any = self.base_layer
        if not weights:
            return base(x, *args, **kwargs)
        if not functional_call.is_plain(base):
            return self._call_with(lambda weight: self._adapt(weight, weights), None, x, *args, **kwargs)
        if autograd.can_recompute(base, x, *args, *kwargs):
            weight = self.unmerged_weight()
            with without_autocast(weight):  # bfloat16 would blur the small matrices
                updates = self.weight_updates(weights)
            return autograd.call(base, weight, updates, x)
        adapted = self._adapt(self.unmerged_weight(), weights)
        return functional_call.call(base, adapted, base.bias, x, *args, **kwargs)

    def _forward_mixed(self, mixed: MixedBatch, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward with a weight for each sample."""
        if functional_call.is_plain(self.base_layer):
            return mixed.call(self.base_layer, self.unmerged_weight(), x, *args, **kwargs)
        if not mixed.updates:
            return self._call_with(lambda weight: weight, None, x, *args, **kwargs)
        return self._call_with(mixed.adapt, mixed.run, x, *args, **kwargs)

    def _call_with(
        self, adapt: Callable[[Tensor], Tensor], per_sample: Any, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The base module's own call, in which what `adapt` makes of the unmerged weight takes the weight's place."""

        def adapt_unmerged(weight: Tensor) -> Tensor:
            return adapt(self.unmerged_weight().to(weight) if self.holds_merged else weight)

        with functional_call.SubstituteWeight(self.get_base_layer(), adapt_unmerged, per_sample) as substitute:
            result = self.base_layer(x, *args, **kwargs)
        substitute.check()
        return result

    def adapted_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The base weight changed by these adapters, each times its weight; like the base weight in all else."""
        return self._adapt(self.unmerged_weight(), {name: self.scaling[name] for name in adapter_names})

    def _adapt(self, weight: Tensor, weights: Mapping[str, float]) -> Tensor:
        """A weight changed by adapters, each times its weight."""
        with without_autocast(weight):  # bfloat16 would blur the small matrices
            return adapt_weight(weight, [update.to(weight.device) for update in self.weight_updates(weights)])

    @property
    def mixed_batch(self) -> MixedBatch | None:
        """The batch that this thread mixes; None: it mixes none."""
        mixed: MixedBatch | None = self._mixed.value
        return mixed

    @mixed_batch.setter
    def mixed_batch(self, mixed: MixedBatch | None) -> None:
        self._mixed.value = mixed

    @torch.no_grad()
    def mix(
        self,
        layout: BatchLayout,
        samples: Sequence[Mapping[str, float]],
        directions: Sequence[Mapping[str, Mapping[str, Tensor]]] = (),
    ) -> None:
        """Let each sample of a batch have adapters of its own, until `mixed_batch` is None again.

        Args:
            layout: how the samples lie in what `forward` gets; it may change between calls.
            samples: adapter -> weight, for each sample.
            directions: adapter -> delta -> directions (d, k) that it acts along, for each sample; where there are none,
                it acts along all.
        """
        of_samples = dict.fromkeys(name for sample in samples for name, weight in sample.items() if weight)
        names = [name for name in of_samples if name in self.scaling]  # it may have many more
        weights = torch.tensor([[sample.get(name, 0.0) for sample in samples] for name in names])  # (names, samples)
        kept = {name: _stack([projections(of_sample.get(name, {})) for of_sample in directions]) for name in names}
        updates = self.weight_updates(dict(zip(names, weights, strict=True)), kept)
        self.mixed_batch = MixedBatch(layout, sum_by_view(updates))

    def _set_written(self, weights: Mapping[str, float] | None) -> None:
        """Note what is written into the base weight."""
        self.written = None if weights is None else dict(weights)  # adapter -> weight
        self.merged_adapters = list(weights or ())
        self.holds_merged = weights is not None  # compiled code would look into the mapping, and at the list's length

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight over the base weight, which is kept aside.

        Args:
            safe_merge: check that the merged weight is finite before it is put in place.
            adapter_names: the adapters to merge beside those that are; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; nothing was changed.
            UserError: see `write`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        weights = {**(self.written or {}), **{name: self.scaling[name] for name in names}}
        if safe_merge and not torch.isfinite(self._adapt(self.unmerged_weight(), weights)).all():
            raise ValueError(
                f"merging {list(weights)} gives values that are not finite; lower their weights or retrain them"
            )
        self.write(weights, self.base_weight.offloaded)

    @torch.no_grad()
    def write(self, weights: Mapping[str, float], offloaded: Callable[[], Tensor] | None = None) -> None:
        """Write the base weight, changed by exactly these adapters, into the memory of the weight in place.

        Args:
            weights: adapter -> weight, for adapters of this layer; none for the base weight.
            offloaded: reads the base weight from elsewhere; None: a copy of it is kept on its device.

        Raises:
            UserError: the memory cannot hold an adapted weight.
        """
        base = self._release_others()
        updates = self.weight_updates(weights)
        with self._coefficients.kept(self._sources):  # they are those of the base weight
            base.write(updates, offloaded)
        self._set_written(weights)

    def unmerge(self) -> None:
        """Copy the base weight back, every bit as it was; without effect where nothing is merged."""
        if not self.holds_merged:
            return
        base = self._release_others()
        with self._coefficients.kept(self._sources):
            base.restore()
        self._set_written(None)

    def _release_others(self) -> BaseWeight:
        """Let layers of other methods act unmerged: the weight is about to be written from the base weight."""
        base = self.base_weight
        base.release_layers()
        inside = self.base_layer
        while isinstance(inside, BaseTunerLayer):
            base.release(inside)
            inside = inside.base_layer
        return base

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it is merged, the others stay merged without it, or unmerged if they cannot be."""
        if self.written and adapter_name in self.written:
            others = {name: weight for name, weight in self.written.items() if name != adapter_name}
            if others and not weight_access.why_not_written(self.get_base_layer()):
                self.write(others, self.base_weight.offloaded)
            else:
                self.unmerge()
        super().delete_adapter(adapter_name)


def _stack(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Delta -> projections (samples, d, d), for all deltas of which a sample has one; others keep all of it."""
    sizes = {delta: len(matrix) for of_sample in samples for delta, matrix in of_sample.items()}
    return {
        delta: torch.stack([of_sample.get(delta, torch.eye(size)) for of_sample in samples])
        for delta, size in sizes.items()
    }
