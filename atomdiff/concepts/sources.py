"""The concepts that another one was made from, as its metadata names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.utils.hashing import hash_file

AVERAGE_OF = "average_of"
INIT_FROM = "init_from"
_LABELS = {AVERAGE_OF: "average of", INIT_FROM: "started from"}
_KEPT = ("steps", "seed", "final_loss")


def describe_source(path: Path, concept: ConceptFile, weight: float) -> dict[str, Any]:
    """Return what a concept's metadata says of a concept that it was made from with a weight."""
    kept = {key: concept.training[key] for key in _KEPT if key in concept.training}
    return {"name": path.name.partition(".")[0], "sha256": hash_file(path), "weight": weight, **kept}


def label_sources(training: Mapping[str, Any]) -> dict[str, str]:
    """Return how a concept was made from others, such as "average of" -> "mug-1 (0.5), mug-2 (0.5)"; else nothing."""
    return {
        label: ", ".join(f"{each.get('name')} ({each.get('weight'):.3g})" for each in training[key])
        for key, label in _LABELS.items()
        if isinstance(training.get(key), list)
        and all(isinstance(each, dict) and isinstance(each.get("weight"), (int, float)) for each in training[key])
    }
