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
    """What one concept has for one weight."""

    settings: AtomSettings
    module: str
    """Path of the layer in diffusers' model, such as `conv_in`."""
    tensors: Mapping[str, Tensor]
    """By kind, as in the file."""
    weight: float
    """Adapter weight."""


class AtomsAdapter(WeightAdapterBase):  # type: ignore[misc]
    """The atoms of all concepts that change one weight: every block B of it becomes (I + C).T @ B @ (I + S).

    Their S and their C are added up before the weight is touched, so that one adapter holds all of them.
    """

    name = "atoms"

    def __init__(self, layers: Sequence[LayerOfConcept]) -> None:
        self.layers = tuple(layers)
        self.weights = [tensor for layer in layers for tensor in layer.tensors.values()]
        self.loaded_keys: set[str] = set()

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
            for layer in self.layers
            for update in weight_updates(layer.settings, layer.module, layer.tensors, wide, strength * layer.weight)
        ]
        return adapt_weight(wide, updates).to(weight.dtype)


def add_atoms(patcher: Any, layers: Mapping[str, LayerOfConcept]) -> None:
    """Add the layers of a concept to a model, by the keys of their weights.

    Atoms are a change of the base, so they come before LoRAs and other patches, whatever the order of nodes, and
    together with the atoms of earlier nodes; but after merges of models, which make the base.

    Args:
        patcher: a clone of ComfyUI's `ModelPatcher`, whose patches nobody else has.
        layers: weight's key -> layer.
    """
    for key, layer in layers.items():
        before = [entry for entry in patcher.patches.get(key, []) if isinstance(entry[1], AtomsAdapter)]
        earlier = [replace(each, weight=entry[0] * each.weight) for entry in before for each in entry[1].layers]
        patcher.add_patches({key: AtomsAdapter([*earlier, layer])})
        others = [entry for entry in patcher.patches[key] if not isinstance(entry[1], AtomsAdapter)]
        merges = [number for number, entry in enumerate(others, start=1) if _is_merge(entry)]
        others.insert(max(merges, default=0), patcher.patches[key][-1])
        patcher.patches[key] = others


def _is_merge(entry: tuple[Any, ...]) -> bool:
    """Return whether a patch (strength, value, strength of the model, ...) puts another model in the base's place."""
    return entry[2] != 1.0 or isinstance(entry[1], list)
