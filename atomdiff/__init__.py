"""Filter atoms: personalize diffusion models with small files.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atomdiff.utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from atomdiff.activation_adapters import CoeffTuningConfig, CombinedConfig, ConvAdapterConfig, MonaConfig
    from atomdiff.concepts.library import ConceptLibrary
    from atomdiff.concepts.push import push_to_hub
    from atomdiff.pipelines.load import load_atoms, unload_atoms
    from atomdiff.pipelines.loaded_concepts import list_atoms
    from atomdiff.pipelines.mixed_batch import mixed_batch
    from atomdiff.pipelines.models import locked
    from atomdiff.pipelines.save import save_atoms
    from atomdiff.pipelines.switch import merge, restore, set_active
    from atomdiff.tuner import AtomConfig, AtomModel

_HOMES = {
    "AtomConfig": "atomdiff.tuner",
    "AtomModel": "atomdiff.tuner",
    "CoeffTuningConfig": "atomdiff.activation_adapters",
    "CombinedConfig": "atomdiff.activation_adapters",
    "ConceptLibrary": "atomdiff.concepts.library",
    "ConvAdapterConfig": "atomdiff.activation_adapters",
    "MonaConfig": "atomdiff.activation_adapters",
    "list_atoms": "atomdiff.pipelines.loaded_concepts",
    "load_atoms": "atomdiff.pipelines.load",
    "locked": "atomdiff.pipelines.models",
    "merge": "atomdiff.pipelines.switch",
    "mixed_batch": "atomdiff.pipelines.mixed_batch",
    "push_to_hub": "atomdiff.concepts.push",
    "restore": "atomdiff.pipelines.switch",
    "save_atoms": "atomdiff.pipelines.save",
    "set_active": "atomdiff.pipelines.switch",
    "unload_atoms": "atomdiff.pipelines.load",
}

__all__ = [
    "AtomConfig",
    "AtomModel",
    "CoeffTuningConfig",
    "CombinedConfig",
    "ConceptLibrary",
    "ConvAdapterConfig",
    "MonaConfig",
    "list_atoms",
    "load_atoms",
    "locked",
    "merge",
    "mixed_batch",
    "push_to_hub",
    "restore",
    "save_atoms",
    "set_active",
    "unload_atoms",
]

# torch, PEFT and transformers are imported only when something is used.
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
