"""The changes of all concepts of a library as unit vectors, in a file beside them: cosines in microseconds each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.concepts.atom_changes import AtomChanges, Fingerprint, can_compare, changes_of, concatenate
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
    """Concepts of one base whose changes have the same elements; those of some layers have zeros elsewhere."""

    spaces: dict[str, str]
    """As `AtomChanges` has them; empty: concepts that cannot be compared."""
    sizes: dict[str, int]
    """Delta -> number of elements, in their order in the vectors."""
    fingerprint: Fingerprint
    """The base."""
    entries: Sequence[Entry]
    """The concepts, one a row."""
    vectors: Tensor
    """Unit vectors (concepts, elements), float32."""

    def takes(self, changes: AtomChanges) -> bool:
        """Whether changes are of this base, and of no other elements."""
        return changes.spaces.keys() <= self.spaces.keys() and can_compare(self.spaces, self.fingerprint, changes)

    def with_rows(self, rows: Sequence[tuple[Entry, Tensor]]) -> Group:
        """The group of these concepts in place of its own."""
        vectors = torch.stack([vector for _, vector in rows])
        return Group(self.spaces, self.sizes, self.fingerprint, [entry for entry, _ in rows], vectors)


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
        self._groups = [kept for group in self._groups if (kept := _kept(group, concepts)).entries]
        known = {entry.name for group in self._groups for entry in group.entries}
        new = [info for name, info in concepts.items() if name not in known and not info.is_lora]
        if not new:
            return
        self._groups = _join([*self._groups, *_read(new, self._groups)])
        if 100 * len(new) > len(known):
            self._save()

    def cosines(self, changes: AtomChanges) -> Iterator[tuple[list[str], Tensor]]:
        """Names of the concepts that can be compared, and the cosines (concepts,) of their changes with these."""
        for group in self._groups:
            if can_compare(group.spaces, group.fingerprint, changes):
                vector = concatenate(changes.values, group.sizes) / changes.norm
                yield [entry.name for entry in group.entries], group.vectors @ vector

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
    """Pairs of concepts and their cosines; of concepts with equal tensors one is compared with others."""
    first: dict[str, str] = {}
    for entry in [entry for group in groups for entry in group.entries if entry.content]:
        if (equal := first.setdefault(entry.content, entry.name)) != entry.name:
            yield equal, entry.name, 1.0
    for group in groups if threshold <= 1 else ():
        if not group.spaces:
            continue
        rows = [row for row, entry in enumerate(group.entries) if first[entry.content] == entry.name]
        vectors = group.vectors if len(rows) == len(group.entries) else group.vectors[rows]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            cosines = vectors[start : start + _ROWS_AT_ONCE] @ vectors[start:].T
            for one, other in (cosines >= threshold).triu(1).nonzero().tolist():
                names = (group.entries[rows[start + number]].name for number in (one, other))
                yield *names, min(float(cosines[one, other]), 1.0)


def _read(infos: Sequence[ConceptInfo], groups: Sequence[Group]) -> list[Group]:
    """Read concepts, and put them into these groups, or into new ones; only the new rows are returned."""
    read = []
    for info in ProgressBar(infos, "comparing concepts", unit="concepts", disable=len(infos) <= _FEW):
        content, changes = "", None
        try:
            concept = read_concept_file(info.path)
            content = content_of(concept)
            changes = changes_of(concept)
        except UserError:  # damaged, or not to be compared
            pass
        entry = Entry(info.name, info.size, info.mtime_ns, info.inode, content)
        read.append((entry, changes if changes is not None and changes.norm > 0 else None))
    read.sort(key=lambda each: -len(each[1].spaces) if each[1] else 0)  # those of all layers before those of some
    none = Group({}, {}, {}, [], torch.zeros(0, 0))
    found = [none, *groups]
    rows: dict[int, tuple[Group, list[tuple[Entry, Tensor]]]] = {}
    for entry, changes in read:
        group, vector = none, torch.zeros(0)
        if changes is not None:
            sizes = {key: len(values) for key, values in sorted(changes.values.items())}
            new = Group(changes.spaces, sizes, changes.fingerprint, [], torch.zeros(0, sum(sizes.values())))
            group = next((each for each in found if each.takes(changes)), new)
            if group is new:
                found.append(new)
            vector = concatenate(changes.values, group.sizes) / changes.norm
        rows.setdefault(id(group), (group, []))[1].append((entry, vector))
    return [group.with_rows(of_group) for group, of_group in rows.values()]


def _join(groups: Iterable[Group]) -> list[Group]:
    """Make one group of those that have the same elements and base."""
    joined: dict[str, list[Group]] = {}
    for group in groups:
        joined.setdefault(json.dumps([group.spaces, group.fingerprint], sort_keys=True), []).append(group)
    return [
        Group(
            first.spaces,
            first.sizes,
            first.fingerprint,
            [entry for group in (first, *others) for entry in group.entries],
            torch.cat([group.vectors for group in (first, *others)]) if others else first.vectors,
        )
        for first, *others in joined.values()
    ]


def _kept(group: Group, concepts: dict[str, ConceptInfo]) -> Group:
    """The part of a group whose files are as they were."""
    rows = [row for row, entry in enumerate(group.entries) if entry.is_of(concepts.get(entry.name))]
    if len(rows) == len(group.entries):
        return group
    entries = [group.entries[row] for row in rows]
    return Group(group.spaces, group.sizes, group.fingerprint, entries, group.vectors[rows])


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
