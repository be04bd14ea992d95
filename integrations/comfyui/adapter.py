"""Atoms as a weight adapter, with which ComfyUI computes a changed weight; it keeps and restores the base itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from atomdiff.atoms.merge import adapt_weight
from atomdiff.atoms.settings import AtomSettings
from atomdiff.concepts.weight_updates import weight_updates


@dataclass(frozen=True)
class LayerOfConcept:
    """What one concept has for one weight, but for its tensors."""

    settings: AtomSettings
    module: str
    """Path of the layer in diffusers' model, such as `conv_in`."""
    kinds: tuple[str, ...]
    """Kinds of its tensors, as in the file."""
    weight: float
    """Adapter weight."""


LayerWithTensors = tuple[LayerOfConcept, Sequence[Tensor]]


class AtomsAdapter(WeightAdapterBase):  # type: ignore[misc]
    """The atoms of all concepts that change one weight: every block B of it becomes (I + C).T @ B @ (I + S).

    Their S and their C are added up before the weight is touched, so that one adapter holds all of them.
    """

    name = "atoms"

    def __init__(self, loaded_keys: set[str], weights: Sequence[LayerWithTensors]) -> None:
        """Take arguments as ComfyUI's adapters do: it makes copies whose tensors are on another device.

        Args:
            loaded_keys: of no use here.
            weights: what each concept has for the weight, in lists and tuples, which ComfyUI looks into.
        """
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Return the adapted weight, in the weight's dtype and computed in float32 at least; `weight` is the base."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        updates = [
            update
            for layer, tensors in self.weights
            for update in weight_updates(
                layer.settings,
                layer.module,
                dict(zip(layer.kinds, tensors, strict=True)),
                wide,
                strength * layer.weight,
            )
        ]
        return adapt_weight(wide, updates).to(weight.dtype)


def add_atoms(patcher: Any, layers: Mapping[str, LayerWithTensors]) -> None:
    """Add the layers of a concept to a model, by the keys of their weights.

    Atoms are a change of the base, so they come before LoRAs and other patches, whatever the order of nodes, and
    together with the atoms of earlier nodes; but after merges of models, which make the base.

    Args:
        patcher: a clone of ComfyUI's `ModelPatcher`, whose patches nobody else has.
        layers: weight's key -> layer and its tensors.
    """
    for key, layer in layers.items():
        before = [entry for entry in patcher.patches.get(key, []) if isinstance(entry[1], AtomsAdapter)]
        earlier = [
            (replace(each, weight=entry[0] * each.weight), tensors)
            for entry in before
            for each, tensors in entry[1].weights
        ]
        patcher.add_patches({key: AtomsAdapter(set(), [*earlier, layer])})
        others = [entry for entry in patcher.patches[key] if not isinstance(entry[1], AtomsAdapter)]
        merges = [number for number, entry in enumerate(others, start=1) if _is_merge(entry)]
        others.insert(max(merges, default=0), patcher.patches[key][-1])
        patcher.patches[key] = others


def _is_merge(entry: tuple[Any, ...]) -> bool:
    """Return whether a patch (strength, value, strength of the model, ...) puts another model in the base's place."""
    return entry[2] != 1.0 or isinstance(entry[1], list)
