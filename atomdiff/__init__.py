"""Filter atoms: personalise diffusion models with files of a few kilobytes.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomdiff.pipeline import list_atoms, load_atoms, merge, restore, save_atoms, unload_atoms
    from atomdiff.tuner import AtomConfig, AtomModel

_HOMES = {
    "AtomConfig": "atomdiff.tuner",
    "AtomModel": "atomdiff.tuner",
    "list_atoms": "atomdiff.pipeline",
    "load_atoms": "atomdiff.pipeline",
    "merge": "atomdiff.pipeline",
    "restore": "atomdiff.pipeline",
    "save_atoms": "atomdiff.pipeline",
    "unload_atoms": "atomdiff.pipeline",
}

__all__ = [
    "AtomConfig",
    "AtomModel",
    "list_atoms",
    "load_atoms",
    "merge",
    "restore",
    "save_atoms",
    "unload_atoms",
]


def __getattr__(name: str) -> Any:
    """Import torch and PEFT only when something is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'atomdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
