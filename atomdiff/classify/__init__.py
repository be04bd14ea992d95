"""Image classifiers tuned on folders of images, by the same methods as diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atomdiff.utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from atomdiff.classify.mixing import mixed_batch
    from atomdiff.classify.model import open_base
    from atomdiff.classify.patches import list_patches, load_patch, set_active, unload_patch
    from atomdiff.classify.saving import load_classifier

_HOMES = {
    "list_patches": "atomdiff.classify.patches",
    "load_classifier": "atomdiff.classify.saving",
    "load_patch": "atomdiff.classify.patches",
    "mixed_batch": "atomdiff.classify.mixing",
    "open_base": "atomdiff.classify.model",
    "set_active": "atomdiff.classify.patches",
    "unload_patch": "atomdiff.classify.patches",
}

__all__ = [
    "list_patches",
    "load_classifier",
    "load_patch",
    "mixed_batch",
    "open_base",
    "set_active",
    "unload_patch",
]

# torch, PEFT and transformers are imported only when something is used.
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
