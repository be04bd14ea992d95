"""How files held the layers of `share="kind"` at first: two tensors a kind; such files are read, not written.

Keys are `<component>.shared.<kind>.<m>x<d>`, such as `unet.shared.atom_mix.9x9`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

MARK = "shared"
_NAMES = ("atom", "channel")  # of atoms


def unpack(
    tensors: Mapping[str, Tensor], places: Mapping[str, Any], modules: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Take them apart; the layers of a kind share one tensor of directions.

    Args:
        tensors: by key: directions (n, m, d), and mixes (layers, n).
        places: from a file: by what their keys have in common, such as `unet.atom.9x9`, the layers of the mixes as
            their places among the sorted modules.
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
    """Whether a key is one of these."""
    parts = key.split(".")
    return len(parts) == 4 and parts[1] == MARK and parts[2] in {f"{n}_{w}" for n in _NAMES for w in ("mix", "shared")}


def _key(component: str, kind: str, size: str) -> str:
    return f"{component}.{MARK}.{kind}.{size}"
