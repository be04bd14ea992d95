"""The layers that files of a concept or a classifier get, by the scores learned with them (`select="adaptive"`)."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from atomdiff.atoms.variants import SCORE_NAME, SCORE_THRESHOLD
from atomdiff.concepts.concept_file import ConceptFile, concept_bytes
from atomdiff.tuner.adapter_state import PEFT_PREFIX
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer_adapters import attribute
from atomdiff.utils.errors import UserError, warn


def choose_layers(
    concept: ConceptFile, scores: Mapping[str, float], budget: int | None, dtype: torch.dtype
) -> ConceptFile:
    """Leave out the layers whose score is below the threshold, and those for which a file has no room.

    Layers come in the order of their scores; one that does not fit is passed over for smaller ones. Layers without a
    score, as those of another component may be, stay in any case.

    Args:
        concept: with all layers.
        scores: module -> score.
        budget: bytes that the file may have; None: any number.
        dtype: of its tensors.

    Warns:
        UserWarning: no layer has a score of at least the threshold, or none; the best one is kept.

    Raises:
        UserError: there is no room for any layer that has a score.
    """

    def size(modules: list[str]) -> int:
        return len(concept_bytes(_with_layers(concept, modules), dtype))

    others = [module for module in concept.layers if module not in scores]
    return _with_layers(concept, [*others, *fitting_layers(scores, budget, size, others)])


def fitting_layers(
    scores: Mapping[str, float],
    budget: int | None,
    size: Callable[[list[str]], int],
    others: Sequence[str] = (),
    files: str = "the file has",
) -> list[str]:
    """Choose layers in the order of their scores: those above the threshold for which there is room.

    Args:
        scores: module -> score.
        budget: bytes that are allowed; None: any number.
        size: bytes of what is written with these layers.
        others: layers without a score, which are written in any case.
        files: what is written, for messages.

    Warns:
        UserWarning: no layer has a score of at least the threshold, or none; the best one is kept.

    Raises:
        UserError: there is no room for any layer that has a score.
    """
    ordered = sorted(scores, key=lambda module: -scores[module])
    if scores[ordered[0]] < SCORE_THRESHOLD:
        if others:
            ordered = []
        else:
            warn(
                f"the scores of all {len(scores)} layers are below {SCORE_THRESHOLD}: the best layer is kept alone; "
                "train with a smaller select_penalty"
            )
    kept: list[str] = []
    for module in ordered:
        if kept and scores[module] < SCORE_THRESHOLD:
            break
        if budget is None or size([*others, *kept, module]) <= budget:
            kept.append(module)
    if budget is not None and not kept and (ordered or size([*others]) > budget):
        without = "without the layers that may leave" if others else "without any layer"
        found = f"{files} {size([*others]):,} {without}"
        raise UserError(f"select_budget={budget:,} bytes: {found}, and no room for one; allow more")
    return kept


def without_idle_layers(config: AtomConfig, tensors: Mapping[str, Tensor]) -> tuple[AtomConfig, dict[str, Tensor]]:
    """An adapter as PEFT saves it, without the layers whose score is below the threshold, and without scores.

    It does the same as before. Its settings name its layers, so that PEFT's own loaders find a tensor for each.

    Args:
        config: its settings.
        tensors: by PEFT's keys.

    Returns:
        The settings and tensors; no tensors if no layer acts.

    Warns:
        UserWarning: no layer acts.
    """
    ending = f".{attribute(SCORE_NAME)}"
    scores = {key.removesuffix(ending): float(score) for key, score in tensors.items() if key.endswith(ending)}
    acting = [path for path, score in scores.items() if score >= SCORE_THRESHOLD]
    if not acting:
        warn(
            f"the scores of all {len(scores)} layers are below {SCORE_THRESHOLD}: none of them is saved; train with a "
            "smaller select_penalty"
        )
    modules = [path.removeprefix(PEFT_PREFIX) for path in acting]
    config, kept = with_chosen_layers(config, tensors, modules)
    return config, kept if acting else {}


def with_chosen_layers(
    config: AtomConfig, tensors: Mapping[str, Tensor], modules: Collection[str]
) -> tuple[AtomConfig, dict[str, Tensor]]:
    """An adapter as PEFT saves it, with these of its layers, and without scores.

    Args:
        config: its settings.
        tensors: by PEFT's keys.
        modules: paths of the layers that stay.
    """
    config = copy.deepcopy(config)
    config.target_modules = f"(?:{'|'.join(map(re.escape, modules))})"  # a list would mean all names that end so
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.select, config.select_penalty, config.select_budget = "all", type(config).select_penalty, None
    ending = f".{attribute(SCORE_NAME)}"
    scored = {key.removesuffix(ending) for key in tensors if key.endswith(ending)}
    idle = scored - {f"{PEFT_PREFIX}{module}" for module in modules}
    kept = (key for key in tensors if key.rpartition(".")[0] not in idle and not key.endswith(ending))
    return config, {key: tensors[key] for key in kept}


def count_by_block(modules: Iterable[str]) -> str:
    """How many layers each block of a model has, as text; a path names its block up to the first number in it."""
    counts = Counter(re.sub(r"(\.\d+)\..*", r"\1", module) for module in modules)
    return ", ".join(f"{block} {count}" for block, count in sorted(counts.items()))


def _with_layers(concept: ConceptFile, kept: list[str]) -> ConceptFile:
    layers = {module: tensors for module, tensors in concept.layers.items() if module in kept}
    return dataclasses.replace(
        concept,
        layers=layers,
        fingerprint={module: concept.fingerprint[module] for module in layers},
        training={**concept.training, "selected_layers": f"{len(kept)} of {len(concept.layers)}"},
    )
