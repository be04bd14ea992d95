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

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


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

    A layer has the atoms of the first concept with a weight above 0 that has this layer. Deltas on other atoms are
    brought to those, which is exact where they can make the same change. Concepts without the layer do not change it,
    such as where each run has chosen its own (`select="adaptive"`). Means of equal values are those values, to the bit.

    Directions that layers share are averaged if their mixes are the same; else the average has those of all concepts.

    Args:
        concepts: trained from one start.
        weights: of each, at least 0; their sum is taken for 1.
        names: of each, for messages.

    Raises:
        UserError: two differ in more than their trained values; the message says in what.
    """
    known = concepts[0]
    for name, concept in zip(names, concepts, strict=True):
        if why := _why_not(known, concept):
            raise UserError(f"{name} cannot be averaged with {names[0]}: {why}")
        known = dataclasses.replace(
            known, layers=concept.layers | known.layers, fingerprint=concept.fingerprint | known.fingerprint
        )
    used = [each for each in zip(concepts, weights, names, strict=True) if each[1] > 0]
    first, shares = used[0][0], [weight for _, weight, _ in used]
    modules = [module for module in known.layers if any(module in concept.layers for concept, *_ in used)]
    config = first.config
    if config.share and not _have_the_same_mixes([concept for concept, *_ in used]):
        config = dataclasses.replace(config, share_count=len(used) * config.share_count)
        layers = _with_all_directions([concept for concept, *_ in used], shares, modules)
    else:
        layers = {module: _mean_layer(module, used) for module in modules}
    tokens = {word: weighted_means([concept.tokens[word] for concept, *_ in used], shares) for word in first.tokens}
    fingerprint = {module: known.fingerprint[module] for module in modules}
    return dataclasses.replace(first, config=config, layers=layers, fingerprint=fingerprint, tokens=tokens)


def _mean_layer(module: str, used: Sequence[tuple[ConceptFile, float, str]]) -> dict[str, Tensor]:
    """The mean of a layer of concepts with weights and names; it has none in some of them."""
    owners = [each for each in used if module in each[0].layers]
    tensors = owners[0][0].layers[module]
    trained = []
    for concept, _, name in owners:
        try:
            trained.append(trained_on(tensors, concept.layers[module], concept.config.basis))
        except UserError as error:
            raise UserError(f"{name} cannot be averaged with {owners[0][2]}: {module}: {error}") from error
    shares = [weight for _, weight, _ in owners]
    means = weighted_means(trained, shares)
    if len(owners) < len(used):
        share = sum(shares) / sum(weight for _, weight, _ in used)
        means |= {kind: mean * share for kind, mean in means.items() if kind.endswith("_delta")}
    return tensors | means


def _have_the_same_mixes(concepts: Sequence[ConceptFile]) -> bool:
    first, *others = ({m: _of_kind(tensors, "_mix") for m, tensors in c.layers.items()} for c in concepts)
    return all(
        mixes.keys() == first.keys()
        and all(torch.equal(mix, first[m][kind]) for m, of_layer in mixes.items() for kind, mix in of_layer.items())
        for mixes in others
    )


def _with_all_directions(
    concepts: Sequence[ConceptFile], weights: Sequence[float], modules: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The layers of the mean: mixes (concepts * n,) of the directions (concepts * n, m, d) of all concepts."""
    directions: dict[tuple[str, str, torch.Size], dict[int, Tensor]] = {}  # by kind of layer, then concept
    for number, concept in enumerate(concepts):
        for module, tensors in concept.layers.items():
            for name, shared in _of_kind(tensors, "_shared").items():
                directions.setdefault((module.partition(".")[0], name, shared.shape), {})[number] = shared
    joined = {
        kind: torch.cat([of_kind.get(number, torch.zeros(kind[2])) for number in range(len(concepts))])
        for kind, of_kind in directions.items()
    }
    layers: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    for module in modules:
        of_concepts = [concept.layers.get(module, {}) for concept in concepts]
        for kind, shared in _of_kind(next(filter(None, of_concepts)), "_shared").items():
            mix = kind.replace("_shared", "_mix")
            shares = [weight / sum(weights) for weight in weights]
            none = torch.zeros(len(shared))
            mixes = [tensors.get(mix, none) * share for tensors, share in zip(of_concepts, shares, strict=True)]
            layers[module] |= {mix: torch.cat(mixes), kind: joined[module.partition(".")[0], kind, shared.shape]}
    return layers


def _of_kind(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {kind: tensor for kind, tensor in tensors.items() if kind.endswith(ending)}


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
    common = first.layers.keys() & other.layers.keys()
    if modules := sorted(first.layers.keys() ^ other.layers.keys()):
        if any(getattr(first.config, name) != getattr(other.config, name) for name in _TARGETS):
            return f"only one of them adapts {list_some(modules)}; average runs of one adapter config"
        if not common:
            return "they have no layer in common, by which their base could be compared; average others of the runs"
    if (distance := fingerprint_distance(first.fingerprint, other.fingerprint)) > SAME_BASE:
        return f"it was made on another base, at distance {distance:.3g} (0: the same); average runs of one base"
    for module in sorted(common):
        tensors = first.layers[module]
        if shapes_of(tensors) != shapes_of(other.layers[module]):
            return f"the tensors of {module} have other shapes; average runs of one adapter config"
        trained = ("_delta", "_basis", *(("_shared", "_mix") if first.config.share else ()))
        fixed = [kind for kind in tensors if not kind.endswith(trained)]
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
