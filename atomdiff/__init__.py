"""Filter atoms: personalise diffusion models with files of a few kilobytes.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atomdiff.active import set_active
    from atomdiff.hub import push_to_hub
    from atomdiff.library import ConceptLibrary
    from atomdiff.mixed import mixed_batch
    from atomdiff.pipeline import list_atoms, load_atoms, merge, restore, save_atoms, unload_atoms
    from atomdiff.tuner import AtomConfig, AtomModel

_HOMES = {
    "AtomConfig": "atomdiff.tuner",
    "AtomModel": "atomdiff.tuner",
    "ConceptLibrary": "atomdiff.library",
    "list_atoms": "atomdiff.pipeline",
    "load_atoms": "atomdiff.pipeline",
    "merge": "atomdiff.pipeline",
    "mixed_batch": "atomdiff.mixed",
    "push_to_hub": "atomdiff.hub",
    "restore": "atomdiff.pipeline",
    "save_atoms": "atomdiff.pipeline",
    "set_active": "atomdiff.active",
    "unload_atoms": "atomdiff.pipeline",
}

__all__ = [
    "AtomConfig",
    "AtomModel",
    "ConceptLibrary",
    "list_atoms",
    "load_atoms",
    "merge",
    "mixed_batch",
    "push_to_hub",
    "restore",
    "save_atoms",
    "set_active",
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
