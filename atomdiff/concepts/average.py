"""`atomdiff average`: one concept from several that were trained from the same start.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", arXiv 2203.05482, carried over to atoms and token embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.concepts.atom_changes import trained_on
from atomdiff.concepts.compact_metadata import SCHEDULE_SETTINGS
from atomdiff.concepts.compatibility import SAME_BASE, fingerprint_distance
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, shapes_of, stored_dtype, write_concept_file
from atomdiff.concepts.sources import AVERAGE_OF, describe_source
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup
from atomdiff.utils.paths import PathText, check_writable, refuse_overlap
from atomdiff.utils.untrusted import list_some, printable
from atomdiff.utils.versions import atomdiff_version


@dataclass(frozen=True, kw_only=True)
class AverageConfig(ConfigGroup):
    """Write the average of concepts that were trained from one start."""

    files: tuple[PathText, ...]
    """Concept files of one base and adapter config, with the same trigger words."""
    output: PathText
    """Concept file to write."""
    weights: tuple[float, ...] = ()
    """A weight for each file; their sum is taken for 1. Default: all alike."""

    def check(self) -> None:
        """Check that there is something to average, and a weight for each."""
        if len(self.files) < 2:
            raise UserError(f"files={', '.join(self.files)}: expected two concept files or more")
        if self.weights and len(self.weights) != len(self.files):
            raise UserError(f"found {len(self.weights)} weights for {len(self.files)} files; expected one for each")
        if self.weights and not (all(0 <= each < 1e9 for each in self.weights) and sum(self.weights) > 0):
            found = " ".join(map(str, self.weights))
            raise UserError(f"weights={found}: expected numbers of at least 0, of which one is above 0")


def average_files(config: AverageConfig) -> None:
    """Write the average of concept files.

    Raises:
        UserError: a file is damaged, or two were not trained from one start; the message says what differs.
    """
    paths = [Path(file) for file in config.files]
    refuse_overlap({"output": config.output}, {f"the concept {file}": file for file in config.files}, inside=False)
    concepts = [read_concept_file(path) for path in paths]
    output = Path(config.output)
    check_writable(output.parent, f"output={config.output!r}", output.name)
    weights = config.weights or (1.0,) * len(paths)
    average = average_concepts(concepts, weights, config.files)
    shares = [weight / sum(weights) for weight in weights]
    sources = [describe_source(*each) for each in zip(paths, concepts, shares, strict=True)]
    average = dataclasses.replace(
        average,
        training={"config": _common_config(concepts), AVERAGE_OF: sources},
        modelspec=average.modelspec | {"title": output.name.partition(".")[0]},
        atomdiff_version=atomdiff_version(),
    )
    write_concept_file(output, average, reduce(torch.promote_types, map(stored_dtype, paths)))


def average_concepts(concepts: Sequence[ConceptFile], weights: Sequence[float], names: Sequence[str]) -> ConceptFile:
    """Return a concept whose changes S and C, and whose token embeddings, are the weighted means of those of several.

    It has the atoms of the first concept with a weight above 0. Deltas on other atoms are brought to those, which is
    exact where they can make the same change. Means of equal values are those values, to the bit.

    Args:
        concepts: trained from one start.
        weights: of each, at least 0; their sum is taken for 1.
        names: of each, for messages.

    Raises:
        UserError: two differ in more than their trained values; the message says in what.
    """
    for name, concept in zip(names, concepts, strict=True):
        if why := _why_not(concepts[0], concept):
            raise UserError(f"{name} cannot be averaged with {names[0]}: {why}")
    used = [each for each in zip(concepts, weights, names, strict=True) if each[1] > 0]
    first, shares = used[0][0], [weight for _, weight, _ in used]
    layers = {}
    for module, tensors in first.layers.items():
        trained = []
        for concept, _, name in used:
            try:
                trained.append(trained_on(tensors, concept.layers[module], first.config.basis))
            except UserError as error:
                raise UserError(f"{name} cannot be averaged with {used[0][2]}: {module}: {error}") from error
        layers[module] = tensors | weighted_means(trained, shares)
    tokens = {word: weighted_means([concept.tokens[word] for concept, *_ in used], shares) for word in first.tokens}
    return dataclasses.replace(first, layers=layers, tokens=tokens)


def weighted_means(tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the means of tensors of the same names, in their dtype; weights are above 0, their sum is taken for 1."""
    total = sum(weights)

    def mean(name: str) -> Tensor:
        weighted = [each[name].double() * weight for each, weight in zip(tensors, weights, strict=True)]
        return (reduce(torch.add, weighted) / total).to(tensors[0][name].dtype)

    return {name: mean(name) for name in tensors[0]}


def _why_not(first: ConceptFile, other: ConceptFile) -> str:
    """Why two concepts were not trained from one start, as far as their files tell; empty: they may have been."""
    own, wanted = other.config.shaping(), first.config.shaping()
    if differing := [f"{key}={own[key]!r}, not {wanted[key]!r}" for key in wanted if own[key] != wanted[key]]:
        return f"it has other atoms ({list_some(differing)}); average runs of one adapter config"
    if first.config.pruned:
        return "both are pruned, each to directions of its own; average the original files, and prune the average"
    if modules := sorted(first.layers.keys() ^ other.layers.keys()):
        return f"only one of them adapts {list_some(modules)}; average runs of one adapter config"
    if (distance := fingerprint_distance(first.fingerprint, other.fingerprint)) > SAME_BASE:
        return f"it was made on another base, at distance {distance:.3g} (0: the same); average runs of one base"
    for module, tensors in first.layers.items():
        if shapes_of(tensors) != shapes_of(other.layers[module]):
            return f"the tensors of {module} have other shapes; average runs of one adapter config"
        fixed = [kind for kind in tensors if not kind.endswith(("_delta", "_shared", "_basis"))]
        if any(not torch.equal(tensors[kind], other.layers[module][kind]) for kind in fixed):
            return f"{module} has another {list_some(fixed)}, and a mean of products is no product of means"
    if first.tokens.keys() != other.tokens.keys():
        words = ", not ".join(list_some(sorted(concept.tokens)) or "none" for concept in (other, first))
        return f"it has other trigger words ({words}); train all with one trigger_word and num_vectors"
    if any(shapes_of(vectors) != shapes_of(other.tokens[word]) for word, vectors in first.tokens.items()):
        return "its trigger words have embeddings of other text encoders; average runs of one base"
    told = [_schedule(concept) for concept in (other, first)]
    return "" if told[0] == told[1] else f"it was trained to predict something else ({told[0]}, not {told[1]})"


def _config(concept: ConceptFile) -> dict[str, Any]:
    config = concept.training.get("config")
    return config if isinstance(config, dict) else {}


def _schedule(concept: ConceptFile) -> str:
    config = _config(concept)
    return (
        printable(", ".join(f"{key} {config[key]}" for key in SCHEDULE_SETTINGS if config.get(key) is not None))
        or "unknown"
    )


def _common_config(concepts: Sequence[ConceptFile]) -> dict[str, Any]:
    """The settings that all runs had."""
    first, *others = map(_config, concepts)
    return {key: value for key, value in first.items() if all(other.get(key, ...) == value for other in others)}
