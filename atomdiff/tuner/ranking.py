"""The directions in which an adapter of atoms changes the weights of all layers, by importance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from atomdiff.atoms.directions import principal_directions
from atomdiff.atoms.variants import variant_of
from atomdiff.tuner.config import AtomConfig

Directions = Mapping[str, Mapping[str, Tensor]]
"""Module -> delta, as `Atoms.delta_name` names it -> directions (d, k), the most important first."""


@dataclass(frozen=True)
class RankedDirections:
    """All directions of an adapter."""

    directions: Directions
    """Those of each delta."""
    groups: Sequence[Sequence[tuple[str, str]]]
    """Module and delta of the directions that are kept together: single ones, or all of a layer; the most important
    group first."""

    def kept(self, keep: float) -> Directions:
        """The directions that are kept of the deltas that do not keep all.

        Args:
            keep: share of all groups that is kept, from 0 to 1; the number is rounded up.
        """
        return self.first(math.ceil(keep * len(self.groups)))

    def first(self, count: int) -> Directions:
        """Those of the `count` most important groups that are of deltas that do not keep all of theirs."""
        counts = self._counts(count)
        modules = {module for module, _ in counts}
        return {
            module: {
                delta: vectors[:, : counts[module, delta]]
                for delta, vectors in of_module.items()
                if counts[module, delta] < vectors.shape[1] or module not in modules
            }
            for module, of_module in self.directions.items()
        }

    def num_directions(self, count: int) -> int:
        """How many directions the `count` most important groups have."""
        return self._counts(count).total()

    def _counts(self, count: int) -> Counter[tuple[str, str]]:
        return Counter(chain.from_iterable(self.groups[:count]))


def rank_directions(
    config: AtomConfig,
    layers: Mapping[str, Mapping[str, Tensor]],
    singular_values: Mapping[str, Sequence[float]],
    whole_layers: bool = False,
) -> RankedDirections:
    """Rank the directions of all layers by the relative change of the weight along each.

    Args:
        config: settings of the adapter.
        layers: module -> tensors by kind.
        singular_values: module -> those of the base weight's rows, as `concepts.compatibility.fingerprint` gives them.
            They tell how much of the weight each atom of the basis `svd` makes up; elsewhere all atoms count alike.
        whole_layers: keep all directions of a layer together, and rank layers by the change along all of them.
    """
    directions: dict[str, dict[str, Tensor]] = {}
    ranked: list[tuple[float, str, str]] = []
    for module in sorted(layers):
        deltas = variant_of(config).deltas(layers[module])
        for name, delta in deltas.items():
            is_of_fingerprint = name != "channel_delta" or len(deltas) == 1
            values = singular_values[module] if is_of_fingerprint else ()
            importance, vectors = principal_directions(delta, _energies(config, delta, values))
            directions.setdefault(module, {})[name] = vectors
            ranked += [(float(value), module, name) for value in importance]
    ranked.sort(key=lambda each: -each[0])
    if not whole_layers:
        return RankedDirections(directions, [[(module, name)] for _, module, name in ranked])
    of_layers: dict[str, list[tuple[float, str, str]]] = {}
    for each in ranked:
        of_layers.setdefault(each[1], []).append(each)
    layers_first = sorted(of_layers.values(), key=lambda of_layer: -math.hypot(*(value for value, *_ in of_layer)))
    return RankedDirections(directions, [[(module, name) for _, module, name in of_layer] for of_layer in layers_first])


def _energies(config: AtomConfig, delta: Tensor, singular_values: Sequence[float]) -> Tensor:
    """The share of the base weight that each atom makes up, (m,)."""
    num_atoms, size = delta.shape[-2:]
    squares = torch.tensor(singular_values, dtype=torch.float64) ** 2
    if config.basis == "svd" and not config.pruned and squares.sum() > 0:
        return squares[:num_atoms] / squares.sum()
    return torch.full((num_atoms,), 1 / size, dtype=torch.float64)
