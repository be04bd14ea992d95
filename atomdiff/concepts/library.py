"""A folder of thousands of concept files: an index of all, and the most recently used ones in memory."""

from __future__ import annotations

import difflib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from atomdiff.concepts.atom_changes import changes_of
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, ConceptFile, read_concept_file
from atomdiff.concepts.library_index import ConceptInfo, LibraryIndex, scan
from atomdiff.concepts.similarity import Duplicates, SimilarConcept
from atomdiff.concepts.similarity_index import SimilarityIndex
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name
from atomdiff.utils.untrusted import list_some

_TENSOR_BYTES = 520  # overhead of torch and Python for a tensor, besides its values; measured
SIMILARITY_FILE = ".similarity.safetensors"
"""What a library keeps in its folder once concepts were compared; it may be removed."""


class ConceptLibrary:
    """The concepts of a folder: `library["animals/cat"]` returns the contents of `animals/cat.atoms.safetensors`.

    Files with that ending and LoRA files of other programs are listed, also in subfolders; hidden ones are skipped,
    links to files are followed, links to folders are not. A file is read when its concept is first used; the most
    recently used concepts stay in memory. The library is thread-safe: each file is read by one thread, the others wait
    for that file only. A `ConceptFile` is shared by all callers and must not be changed.

    Length, iteration over the sorted names, and `in` describe the last scan of the folder. `refresh` scans it again, as
    does a name or phrase that is not found.

    Args:
        folder: the folder of the files.
        memory_budget: bytes that concepts in memory may take; 0 keeps none.

    Raises:
        UserError: there is no such folder, or the budget is negative.
    """

    def __init__(self, folder: str | os.PathLike[str], memory_budget: int = 64 << 20) -> None:
        if memory_budget < 0:
            raise UserError(f"memory_budget={memory_budget}: expected bytes, at least 0")
        self.folder = Path(os.path.abspath(folder))
        self._index = LibraryIndex([], {})  # never changed, only replaced: reading it takes no lock
        self._scans = 0
        self._scanning = threading.Lock()
        self._lock = threading.Lock()  # of all below, and of replacing the index; never held while a file is read
        self._cache: LRUCache[ConceptInfo, ConceptFile] = LRUCache(memory_budget, _memory)
        self._reading: dict[ConceptInfo, Future[ConceptFile]] = {}
        self._comparing = threading.Lock()  # of the two below
        self._compared: LibraryIndex | None = None  # what the next is up to date with
        self._similarities: SimilarityIndex | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._index.concepts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.concepts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize_name(name) in self._index.concepts

    def __getitem__(self, name: str) -> ConceptFile:
        """Return the concept of a name, from memory or from its file; it is shared and must not be changed.

        Raises:
            UserError: there is no such concept, its file is damaged, or it is a LoRA file.
        """
        info = self.info(name)
        if info.is_lora:
            raise UserError(f"{name!r} is a LoRA file and holds no atoms: load it by its path, {info.path}")
        with self._lock:
            if (cached := self._cache.get(info)) is not None:
                return cached
            is_first = info not in self._reading
            reading = self._reading.setdefault(info, Future())
        if is_first:
            self._read(info, reading)
        return reading.result()

    def info(self, name: str) -> ConceptInfo:
        """Return what the header of a concept says, without reading its tensors.

        Raises:
            UserError: there is no such concept, not even after another scan of the folder.
        """
        if name not in self:
            self.refresh()
        if info := self._index.concepts.get(normalize_name(name)):
            return info
        raise UserError(self._unknown_name(name))

    def infos(self) -> list[ConceptInfo]:
        """Return what the headers of all concepts say, sorted by name, as of the last scan."""
        return [*self._index.concepts.values()]

    def find(self, phrase: str) -> list[str]:
        """Return names of concepts with this trigger phrase, then of those with all of its words, whatever the case.

        Trigger phrases and trigger words are searched. The folder is scanned again where nothing is found.
        """
        if names := self._index.find(phrase):
            return names
        self.refresh()
        return self._index.find(phrase)

    def similar(self, concept: str | ConceptFile, k: int = 10) -> list[SimilarConcept]:
        """Return the concepts whose atoms change the base most like another concept's, the most similar first.

        Only concepts of the same base can be compared, and only where they adapt at least one layer in common, with
        atoms of the same shape; others are left out, as are LoRA files. The first call reads all files, and keeps
        what it compares in `SIMILARITY_FILE` in the folder; later ones read only what is new.

        Args:
            concept: a name in the library, or any concept.
            k: how many at most, without the concept itself if it is named.

        Raises:
            UserError: there is no such concept, or it cannot be compared with any; the message says why.
        """
        name = normalize_name(concept) if isinstance(concept, str) else ""
        given = self[concept] if isinstance(concept, str) else concept
        what = f"the concept {name!r}" if name else "the concept"
        try:
            changes = changes_of(given)
        except UserError as error:
            raise UserError(f"{what} cannot be compared: {error}") from error
        if changes.norm == 0:
            raise UserError(f"{what} cannot be compared: all its deltas are zero; expected a trained concept")
        found = [*self._similarity_index().cosines(changes)]
        names = [each for of_group, _ in found for each in of_group]
        if not {*names} - {name}:
            raise UserError(
                f"none of the {len(self)} concepts in {self.folder} can be compared with {what}: expected some of the "
                "same base that adapt layers in common, with atoms of the same shape and without recursion"
            )
        values, order = torch.cat([cosines for _, cosines in found]).clamp(-1, 1).sort(descending=True, stable=True)
        ranked = zip((names[row] for row in order[: k + 1].tolist()), values[: k + 1].tolist(), strict=True)
        return [SimilarConcept(each, value) for each, value in ranked if each != name][:k]

    def duplicates(self, threshold: float = 0.999) -> list[Duplicates]:
        """Return concepts that are nearly the same, the most alike first.

        All pairs are compared, which takes time that grows with the square of their number. Concepts that cannot be
        compared by their atoms are found if all their tensors are equal.

        Args:
            threshold: least cosine of a pair; above 1 only equal files are found.
        """
        return self._similarity_index().duplicates(threshold)

    def _similarity_index(self) -> SimilarityIndex:
        """The index of similarities of the last scan."""
        with self._comparing:
            if self._similarities is None:
                self._similarities = SimilarityIndex(self.folder / SIMILARITY_FILE)
            if self._compared is not (index := self._index):
                self._similarities.update(index.concepts)
                self._compared = index
            return self._similarities

    @property
    def damaged(self) -> dict[Path, str]:
        """Files and subfolders that cannot be used -> the reason, as of the last scan."""
        return dict(self._index.damaged)

    @property
    def memory_budget(self) -> int:
        """Bytes that the concepts in memory may take."""
        return int(self._cache.maxsize)

    @property
    def memory_used(self) -> int:
        """Bytes that the concepts in memory take, with the overhead of Python and torch (estimated)."""
        return int(self._cache.currsize)

    def refresh(self) -> None:
        """Scan the folder: list new files, read the headers of changed ones again, forget removed ones.

        Files and subfolders that cannot be used are listed in `damaged`; a warning names the new ones.

        Raises:
            LibraryFolderError: the folder cannot be read; the library stays as it was.
        """
        scans = self._scans
        with self._scanning:
            if self._scans > scans + 1:  # another thread has begun and ended a scan since this call
                return
            old, new = self._index, scan(self.folder, self._index)
            self._scans += 1
            with self._lock:
                self._index = new
                for info in list(self._cache):
                    if new.concepts.get(info.name) is not info:
                        del self._cache[info]
        if reasons := [reason for path, reason in new.damaged.items() if old.damaged.get(path) != reason]:
            warnings.warn(f"left out of the library (.damaged lists all): {list_some(reasons)}", stacklevel=2)

    def _read(self, info: ConceptInfo, reading: Future[ConceptFile]) -> None:
        """Read a file for all threads that wait for `reading`."""
        try:
            concept = read_concept_file(info.path)
            with self._lock:
                if self._index.concepts.get(info.name) is info:  # it has not changed meanwhile
                    with suppress(ValueError):  # larger than the whole budget
                        self._cache[info] = concept
            reading.set_result(concept)
        except BaseException as error:
            reading.set_exception(error)
        finally:
            with self._lock:
                del self._reading[info]

    def _unknown_name(self, name: str) -> str:
        index = self._index
        for ending in (CONCEPT_SUFFIX, ".safetensors"):
            if reason := index.damaged.get(self.folder / f"{name}{ending}"):
                return f"the concept {name!r} cannot be used: {reason}"
        by_last_part = {known.rpartition("/")[2]: known for known in index.concepts}
        last_part = name.removesuffix(CONCEPT_SUFFIX).rpartition("/")[2]
        similar = [by_last_part[part] for part in difflib.get_close_matches(last_part, by_last_part)]
        hint = f"near: {list_some(similar)}" if similar else "and none of a similar name"
        return f"there is no concept {name!r} among the {len(index.concepts)} in {self.folder}; {hint}"


def _memory(concept: ConceptFile) -> int:
    """Return the bytes that a concept takes; what several concepts share is counted for each."""
    total, tensors = 0, set()  # those that layers share count once
    pending: list[Any] = [vars(concept), vars(concept.config)]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor) and id(value) in tensors:
            continue
        total += sys.getsizeof(value)
        if isinstance(value, Tensor):
            tensors.add(id(value))
            total += value.nbytes + _TENSOR_BYTES
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += value
    return total
