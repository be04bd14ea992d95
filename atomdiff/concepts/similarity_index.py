"""The changes of all concepts of a library as unit vectors, in a file beside them: cosines in microseconds each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.concepts.atom_changes import AtomChanges, Fingerprint, changes_of
from atomdiff.concepts.compatibility import SAME_BASE, fingerprint_distance
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file
from atomdiff.concepts.library_index import ConceptInfo
from atomdiff.concepts.similarity import Duplicates, group_duplicates
from atomdiff.concepts.token_keys import token_tensors
from atomdiff.utils.atomic import WriteError, new_file
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_tensors
from atomdiff.utils.progress import ProgressBar

_FORMAT = "atomdiff similarity 1"
_FEW = 100  # concepts, which are read in a second; no progress is shown
_ROWS_AT_ONCE = 1024  # of a matrix of cosines


class Entry(NamedTuple):
    """A concept of a group."""

    name: str
    size: int
    mtime_ns: int
    inode: int
    content: str
    """Hash of its tensors; empty if they cannot be read."""

    def is_of(self, info: ConceptInfo | None) -> bool:
        """Whether the file is still the one that was read."""
        return info is not None and self[:4] == (info.name, info.size, info.mtime_ns, info.inode)


@dataclass(frozen=True)
class Group:
    """Concepts of one base that no delta means something else to; those of some layers have zeros elsewhere.

    Groups are there to have few matrices: concepts of two groups may be comparable, too.
    """

    spaces: dict[str, str]
    """As `AtomChanges` has them, of all concepts; empty: concepts that cannot be compared."""
    sizes: dict[str, int]
    """Delta -> number of elements, in their order in the vectors."""
    fingerprint: Fingerprint
    """The base."""
    entries: Sequence[Entry]
    """The concepts, one a row."""
    vectors: Tensor
    """Unit vectors (concepts, elements), float32."""

    def takes(self, other: Group) -> bool:
        """Whether the concepts of two groups can be in one."""
        common = self.spaces.keys() & other.spaces.keys()
        if not common:
            return not self.spaces and not other.spaces
        return common <= self.common(other) and self.is_of_base(other)

    def common(self, other: Group) -> set[str]:
        """The deltas that mean the same in both groups."""
        return {key for key, space in self.spaces.items() if other.spaces.get(key) == space}

    def is_of_base(self, other: Group) -> bool:
        """Whether two groups are of the same base, as far as the layers tell that both have."""
        return fingerprint_distance(self.fingerprint, other.fingerprint) <= SAME_BASE

    def blocks(self) -> dict[str, Tensor]:
        """Delta -> its part (concepts, elements) of the vectors."""
        return dict(zip(self.sizes, self.vectors.split([*self.sizes.values()], 1), strict=True))

    def arranged(self, sizes: Mapping[str, int], keys: Collection[str] | None = None) -> Tensor:
        """The vectors with the elements of these deltas; zeros in those that the group lacks, or that `keys` does."""
        keys = self.sizes.keys() if keys is None else keys
        if [*sizes] == [*self.sizes] and len(keys) == len(sizes):
            return self.vectors
        blocks, rows = self.blocks(), len(self.entries)
        return torch.cat([blocks[key] if key in keys else torch.zeros(rows, size) for key, size in sizes.items()], 1)

    def part(self, rows: Sequence[int] | range) -> Group:
        """The group of some of its concepts."""
        if len(rows) == len(self.entries):
            return self
        chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else rows  # a slice copies no vectors
        return replace(self, entries=[self.entries[row] for row in rows], vectors=self.vectors[chosen])


class SimilarityIndex:
    """Groups of concepts, kept in a file, whose vectors are mapped into memory and not read before they are used.

    Args:
        file: where they are kept; if it cannot be written, they are kept in memory.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._groups = _load(file)

    def update(self, concepts: dict[str, ConceptInfo]) -> None:
        """Follow a library: read new and changed files, forget those that are gone.

        The file is written again where more than a hundredth of it would be new: so what a later process has to read
        again stays little, and one new concept does not cost all to be written.
        """
        self._groups = [kept for group in self._groups if (kept := group.part(_unchanged(group, concepts))).entries]
        known = {entry.name for group in self._groups for entry in group.entries}
        new = [info for name, info in concepts.items() if name not in known and not info.is_lora]
        if not new:
            return
        self._groups = _join([*self._groups, *_read(new)])
        if 100 * len(new) > len(known):
            self._save()

    def cosines(self, changes: AtomChanges) -> Iterator[tuple[list[str], Tensor]]:
        """Names of the concepts that can be compared, and the cosines (concepts,) of their changes with these."""
        given = _group_of(Entry("", 0, 0, 0, ""), changes)
        for group in self._groups:
            if (cosines := _cosines(given, group)) is not None:
                rows = cosines[0].nonzero()[:, 0]
                yield [group.entries[row].name for row in rows.tolist()], cosines[0, rows]

    def duplicates(self, threshold: float) -> list[Duplicates]:
        """Groups of concepts with equal tensors or at least this cosine; above 1 those with equal tensors alone."""
        groups = self._groups
        contents = {entry.name: entry.content for group in groups for entry in group.entries}
        return group_duplicates(_links(groups, threshold), contents)

    def _save(self) -> None:
        """Write all groups, and map them into memory from there."""
        described = [vars(group) | {"vectors": None} for group in self._groups]
        tensors = {str(number): group.vectors.contiguous() for number, group in enumerate(self._groups)}
        try:
            with new_file(self._file) as file:
                save_file(tensors, file, {"format": _FORMAT, "groups": json.dumps(described)})
        except WriteError as error:
            warnings.warn(f"{error}. Until then all concepts are read again by each process", stacklevel=4)
            return
        saved = _load(self._file)
        if [group.entries for group in saved] == [group.entries for group in self._groups]:  # not another process's
            self._groups = saved


def content_of(concept: ConceptFile) -> str:
    """Hash of a concept's tensors, those of its trigger words included (32 hexadecimal digits)."""
    tensors = {f"{module}.{kind}": tensor for module, of in concept.layers.items() for kind, tensor in of.items()}
    return hash_tensors(tensors | token_tensors(concept.tokens))[:32]


def _links(groups: Sequence[Group], threshold: float) -> Iterator[tuple[str, str, float]]:
    """Pairs of concepts and their cosines; of concepts of a group with equal tensors one is compared with others."""
    first: dict[str, str] = {}
    for entry in [entry for group in groups for entry in group.entries if entry.content]:
        if (equal := first.setdefault(entry.content, entry.name)) != entry.name:
            yield equal, entry.name, 1.0
    distinct = [_distinct(group) for group in groups if group.spaces] if threshold <= 1 else []
    for number, group in enumerate(distinct):
        for other in distinct[number:]:
            yield from _pairs(group, other, threshold)


def _distinct(group: Group) -> Group:
    """One of each of the concepts of a group that have equal tensors."""
    rows = {entry.content: row for row, entry in enumerate(group.entries)}
    return group.part(sorted(rows.values()))


def _pairs(one: Group, other: Group, threshold: float) -> Iterator[tuple[str, str, float]]:
    """Pairs of concepts of two groups, or of one, with at least this cosine."""
    for start in range(0, len(one.entries), _ROWS_AT_ONCE):
        rows = one.part(range(start, min(start + _ROWS_AT_ONCE, len(one.entries))))
        others = other.part(range(start, len(other.entries))) if other is one else other
        cosines = _cosines(rows, others)
        if cosines is None:
            return
        found = cosines >= threshold
        if threshold <= 0:
            found &= cosines != 0
        for row, column in (found.triu(1) if other is one else found).nonzero().tolist():
            yield rows.entries[row].name, others.entries[column].name, min(float(cosines[row, column]), 1.0)


def _cosines(rows: Group, group: Group) -> Tensor | None:
    """Cosines (rows, concepts of the group) of changes; 0 where two cannot be compared, None where no two can.

    Those can be that have deltas in common, all of which mean the same in both. Deltas of zeros count as none.
    """
    common = rows.common(group)
    if not common or not rows.is_of_base(group):
        return None
    others = (rows.spaces.keys() & group.spaces.keys()) - common
    comparable = _comparable(rows, group, others) if others else None
    if comparable is not None and not comparable.any():
        return None
    cosines = rows.arranged(group.sizes, common) @ group.vectors.T
    return cosines if comparable is None else cosines * comparable


def _comparable(rows: Group, group: Group, keys: Iterable[str]) -> Tensor:
    """Which pairs (rows, concepts of the group) have no delta in common that means something else in each."""
    comparable = torch.ones(len(rows.entries), len(group.entries), dtype=torch.bool)
    blocks = rows.blocks(), group.blocks()
    for key in keys:
        has = [of_group[key].any(1) for of_group in blocks]
        comparable &= ~(has[0][:, None] & has[1])
        if not comparable.any():
            break
    return comparable


def _read(infos: Sequence[ConceptInfo]) -> Iterator[Group]:
    """Read concepts, each as a group of its own."""
    for info in ProgressBar(infos, "comparing concepts", unit="concepts", disable=len(infos) <= _FEW):
        content, changes = "", None
        try:
            concept = read_concept_file(info.path)
            content = content_of(concept)
            changes = changes_of(concept)
        except UserError:  # damaged, or not to be compared
            pass
        yield _group_of(Entry(info.name, info.size, info.mtime_ns, info.inode, content), changes)


def _group_of(entry: Entry, changes: AtomChanges | None) -> Group:
    """The group of one concept, by its changes; None: it cannot be compared."""
    if changes is None or changes.norm == 0:
        return Group({}, {}, {}, [entry], torch.zeros(1, 0))
    values = dict(sorted(changes.values.items()))
    vector = torch.cat([*values.values()])[None] / changes.norm
    sizes = {key: len(of_delta) for key, of_delta in values.items()}
    return Group(changes.spaces, sizes, changes.fingerprint, [entry], vector)


def _join(groups: Iterable[Group]) -> list[Group]:
    """Put each group into the first that takes it."""
    joined: list[Group] = []  # of each the spaces, sizes and fingerprint
    parts: list[list[Group]] = []
    for group in groups:
        place = next((place for place, other in enumerate(joined) if other.takes(group)), len(joined))
        if place == len(joined):
            joined.append(group)
            parts.append([])
        elif not group.sizes.keys() <= joined[place].sizes.keys():
            whole = joined[place]
            joined[place] = replace(
                whole,
                spaces=whole.spaces | group.spaces,
                sizes=whole.sizes | group.sizes,
                fingerprint={**group.fingerprint, **whole.fingerprint},
            )
        parts[place].append(group)
    return [_whole(whole, of_group) for whole, of_group in zip(joined, parts, strict=True)]


def _whole(whole: Group, parts: Sequence[Group]) -> Group:
    """A group with the concepts of several, whose elements it has."""
    if len(parts) == 1:
        return parts[0]
    entries = [entry for part in parts for entry in part.entries]
    return replace(whole, entries=entries, vectors=torch.cat([part.arranged(whole.sizes) for part in parts]))


def _unchanged(group: Group, concepts: Mapping[str, ConceptInfo]) -> list[int]:
    """The rows of a group whose files are as they were."""
    return [row for row, entry in enumerate(group.entries) if entry.is_of(concepts.get(entry.name))]


def _load(file: Path) -> list[Group]:
    """Read what `SimilarityIndex` wrote; nothing, if it cannot be read, as then it is made anew."""
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, Any] = opened.metadata() or {}
            described = json.loads(metadata["groups"]) if metadata["format"] == _FORMAT else []
            vectors = [opened.get_tensor(str(number)) for number in range(len(described))]
        groups = [
            Group(**group | {"entries": [Entry(*entry) for entry in group["entries"]], "vectors": of_group})
            for group, of_group in zip(described, vectors, strict=True)
        ]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return []
    fits = all(
        tuple(group.vectors.shape) == (len(group.entries), sum(group.sizes.values()))
        and group.vectors.dtype == torch.float32
        for group in groups
    )
    return groups if fits else []
