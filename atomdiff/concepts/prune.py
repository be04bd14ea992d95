"""`atomdiff prune`: smaller concept files, with the most important directions of a concept alone."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.directions import truncate
from atomdiff.concepts.concept_file import (
    ConceptFile,
    concept_bytes,
    read_concept_file,
    shapes_of,
    stored_dtype,
    write_concept_file,
)
from atomdiff.tuner.ranking import RankedDirections, rank_directions
from atomdiff.utils.atomic import write_bytes
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, check_writable, expand_paths, refuse_overlap
from atomdiff.utils.sizes import parse_bytes


@dataclass(frozen=True)
class PruneConfig:
    """Write a smaller concept file, with the most important directions of a concept."""

    file: PathText
    """The concept file."""
    output: PathText
    """Concept file to write."""
    keep: float | None = None
    """Share of the directions to keep, from 0 to 1: 1 copies the file."""
    bytes: str | None = None
    """Size that the file may have, such as 10KB or 8192; as many directions are kept as fit."""
    whole_layers: bool = False
    """Keep or leave out whole layers: less is kept in the same size, but every version of atomdiff reads the file."""

    def __post_init__(self) -> None:
        """Refuse what names neither or both."""
        expand_paths(self)
        if (self.keep is None) == (self.bytes is None):
            raise UserError("give one of --keep, such as 0.5, and --bytes, such as 10KB")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise UserError(f"keep={self.keep}: expected a share of the directions, from 0 to 1")


@dataclass(frozen=True)
class Pruned:
    """What was kept of a concept."""

    directions: int
    """Directions that are kept."""
    all_directions: int
    """Those of the concept."""
    layers: int
    """Layers that are left."""
    all_layers: int
    """Those of the concept."""
    bytes: int
    """Size of the file."""
    all_bytes: int
    """That of the concept's file."""


def prune_file(config: PruneConfig) -> Pruned:
    """Prune a concept file.

    Raises:
        UserError: the file is damaged, or nothing of it fits.
    """
    refuse_overlap({"output": config.output}, {"the concept": config.file}, inside=False)
    output = Path(config.output)
    concept = read_concept_file(config.file)
    if concept.config.share:
        raise UserError(
            f"{config.file} has directions that layers share, which no layer has fewer of: use it as it is, with keep "
            "in its adapter weight to show less of it"
        )
    check_writable(output.parent, f"output={config.output!r}", output.name)
    ranked = rank_directions(concept.config, concept.layers, concept.fingerprint, config.whole_layers)
    total, size = len(ranked.groups), Path(config.file).stat().st_size
    dtype = stored_dtype(config.file)
    if config.bytes is None:
        count = math.ceil((config.keep or 0) * total)
        fits = config.keep == 1
    else:
        limit = parse_bytes(config.bytes, "bytes")
        fits = size <= limit
        count = total if fits else _largest_fitting(concept, ranked, limit, dtype)
    if fits:
        write_bytes(output, Path(config.file).read_bytes())
        pruned = concept
    else:
        pruned = prune(concept, ranked, count)
        write_concept_file(output, pruned, dtype)
    directions, all_directions = map(ranked.num_directions, (count, total))
    return Pruned(directions, all_directions, len(pruned.layers), len(concept.layers), output.stat().st_size, size)


def describe_pruned(pruned: Pruned) -> str:
    """What was kept, as text."""
    return (
        f"kept {pruned.directions:,} of {pruned.all_directions:,} directions in {pruned.layers} of "
        f"{pruned.all_layers} layers: {pruned.bytes:,} of {pruned.all_bytes:,} bytes"
    )


def prune(concept: ConceptFile, ranked: RankedDirections, count: int) -> ConceptFile:
    """A concept with the `count` most important groups of its directions alone.

    Raises:
        UserError: nothing is left.
    """
    kept = ranked.first(count)
    layers = {module: _prune_layer(concept, tensors, kept[module]) for module, tensors in concept.layers.items()}
    layers = {module: tensors for module, tensors in layers.items() if tensors}
    if not layers and not concept.tokens:
        raise UserError("nothing of the concept is left: keep more of it")
    shapes = {module: shapes_of(tensors) for module, tensors in concept.layers.items()}
    differs = any(shapes_of(tensors) != shapes[module] for module, tensors in layers.items())
    config = dataclasses.replace(concept.config, pruned=concept.config.pruned or differs)
    directions, all_directions = map(ranked.num_directions, (count, len(ranked.groups)))
    training = {**concept.training, "kept_directions": f"{directions} of {all_directions}"}
    if "selected_layers" in training:  # which a run has chosen
        training["selected_layers"] = f"{len(layers)} of {str(training['selected_layers']).rpartition(' of ')[2]}"
    fingerprint = {module: concept.fingerprint[module] for module in layers}
    return dataclasses.replace(concept, config=config, layers=layers, fingerprint=fingerprint, training=training)


def _largest_fitting(concept: ConceptFile, ranked: RankedDirections, limit: int, dtype: torch.dtype) -> int:
    """The largest number of groups whose file fits."""
    least = 0 if concept.tokens else 1

    def size(count: int) -> int:
        return len(concept_bytes(prune(concept, ranked, count), dtype))

    if (smallest := size(least)) > limit:
        directions = ranked.num_directions(least)
        raise UserError(f"bytes={limit:,}: with {directions} directions the file has {smallest:,} bytes; allow as many")
    counts: Any = range(least, len(ranked.groups))
    count = least + bisect.bisect_right(counts, limit, key=size) - 1
    while size(count) > limit:  # a setting more makes the header of pruned files a little larger
        count -= 1
    return count


def _prune_layer(
    concept: ConceptFile, tensors: Mapping[str, Tensor], directions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a layer along some directions (d, k), by delta."""
    pruned = dict(tensors)
    basis = ATOM_BASES[concept.config.basis]
    for delta, vectors in directions.items():
        atoms = delta.replace("_delta", "_basis")
        if not vectors.shape[1]:
            for kind in _kinds_with(delta):
                pruned.pop(kind, None)
        elif atoms in tensors and not basis.has_coefficients:
            pruned[atoms], pruned[delta] = truncate(tensors[atoms], tensors[delta], vectors)
        else:  # no fewer numbers, but those of the directions that are kept
            pruned[delta] = tensors[delta] @ (vectors @ vectors.T).to(tensors[delta])
    return pruned


def _kinds_with(delta: str) -> tuple[str, ...]:
    """The tensors of the atoms that a delta belongs to."""
    return ("channel_delta", "channel_basis") if delta == "channel_delta" else (delta, "recursion_mix", "atom_basis")
