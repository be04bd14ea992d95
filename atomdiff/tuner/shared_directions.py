"""The directions that layers share (`share="kind"`) among the tensors of an adapter: in a file once, or in each layer.

In a model they are one parameter E (n, m, d) under the keys of all layers of a kind. A file has them under the first of
these keys; under the others are tensors (0, m, d), which tell the kind of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atomdiff.atoms.variants import VARIANTS
from atomdiff.tuner.layer_adapters import attribute

_KINDS = frozenset(attribute(name) for variant in VARIANTS for name in variant.shared_names)


def stored_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, by PEFT's keys, with equal directions under the first of their keys alone."""
    stored = dict(tensors)
    for keys in _keys_by_kind(tensors).values():
        first, *others = keys
        stored |= {key: tensors[key][:0] for key in others if torch.equal(tensors[key], tensors[first])}
    return stored


def in_each_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with directions under all of their keys; equal ones are the same object.

    Directions that are missing stay so.
    """
    full = dict(tensors)
    for keys in _keys_by_kind(tensors).values():
        first = next((tensors[key] for key in keys if len(tensors[key])), None)
        if first is not None:
            full |= {key: first for key in keys if not len(tensors[key]) or torch.equal(tensors[key], first)}
    return full


def is_shared(key: str) -> bool:
    """Whether a key is that of directions: it ends with their kind, or with the name of an adapter after it."""
    return not _KINDS.isdisjoint(key.split(".")[-2:])


def _keys_by_kind(tensors: Mapping[str, Tensor]) -> dict[tuple[str, torch.Size], list[str]]:
    """The keys of directions, of layers of one kind together."""
    keys: dict[tuple[str, torch.Size], list[str]] = {}
    for key, tensor in tensors.items():
        if is_shared(key) and tensor.ndim:
            kind = next(part for part in key.split(".")[-2:] if part in _KINDS)
            keys.setdefault((kind, tensor.shape[1:]), []).append(key)
    return keys
