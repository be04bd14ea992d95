"""How files hold the tensors of `share="kind"`: the directions of a kind once, the mixes of its layers as one tensor.

Keys are `<component>.shared.<kind>.<m>x<d>`, such as `unet.shared.atom_mix.9x9`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atomdiff.utils.errors import UserError

MARK = "shared"
_NAMES = ("atom", "channel")  # of atoms

Layers = Mapping[str, Mapping[str, Tensor]]


def pack(layers: Layers) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Pack the tensors of layers.

    Args:
        layers: module -> `<name>_mix` (n,) and `<name>_shared` (n, m, d).

    Returns:
        The tensors by key: directions (n, m, d), and mixes (layers, n). And by what their keys have in common, such as
        `unet.atom.9x9`, the layers of the mixes as their places among the sorted modules.

    Raises:
        UserError: layers of one kind have other directions.
    """
    tensors: dict[str, Tensor] = {}
    mixes: dict[str, list[Tensor]] = {}
    places: dict[str, list[int]] = {}
    for place, module in enumerate(sorted(layers)):
        for name in _NAMES:
            if f"{name}_mix" not in layers[module]:
                continue
            shared = layers[module][f"{name}_shared"]
            component, size = module.partition(".")[0], f"{shared.shape[1]}x{shared.shape[2]}"
            key = _key(component, f"{name}_shared", size)
            if not torch.equal(tensors.setdefault(key, shared), shared):
                raise UserError(
                    f"{module} has other directions than the layers of its kind before it, and a file with "
                    "share='kind' holds them once: train or load the concept in one piece"
                )
            mixes.setdefault(_key(component, f"{name}_mix", size), []).append(layers[module][f"{name}_mix"])
            places.setdefault(f"{component}.{name}.{size}", []).append(place)
    return tensors | {key: torch.stack(each) for key, each in mixes.items()}, places


def unpack(
    tensors: Mapping[str, Tensor], places: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Undo `pack`; the layers of a kind share one tensor of directions.

    Args:
        tensors: by key.
        places: as `pack` gives them, from a file.
        modules: all modules.

    Raises:
        ValueError: they do not belong together.
    """
    modules, left = sorted(modules), dict(tensors)
    layers: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    for key, numbers in places.items():
        component, name, size = (key.split(".") + ["", ""])[:3]
        shared, mixes = (left.pop(_key(component, f"{name}_{what}", size), None) for what in ("shared", "mix"))
        if shared is None or mixes is None or name not in _NAMES or not isinstance(numbers, list):
            raise ValueError(f"{key}: no directions, or no mixes")
        if shared.ndim != 3 or mixes.shape != (len(numbers), len(shared)):
            raise ValueError(f"{key}: {tuple(mixes.shape)} mixes of {tuple(shared.shape)} directions")
        for number, mix in zip(numbers, mixes, strict=True):
            if type(number) is not int or not 0 <= number < len(modules) or f"{name}_mix" in layers[modules[number]]:
                raise ValueError(f"{key}: {number!r} is no layer, or one that it has already")
            if modules[number].partition(".")[0] != component:
                raise ValueError(f"{key}: {modules[number]} is of another component")
            layers[modules[number]] |= {f"{name}_mix": mix, f"{name}_shared": shared}
    if left or not all(layers.values()):
        raise ValueError("tensors without a layer, or layers without a tensor")
    return layers


def is_packed(key: str) -> bool:
    """Whether a key is one of `pack`."""
    parts = key.split(".")
    return len(parts) == 4 and parts[1] == MARK and parts[2] in {f"{n}_{w}" for n in _NAMES for w in ("mix", "shared")}


def _key(component: str, kind: str, size: str) -> str:
    return f"{component}.{MARK}.{kind}.{size}"
