"""A folder of thousands of concept files: an index of all of them, and in memory those that were asked for last."""

from __future__ import annotations

import difflib
import os
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from atomdiff.concepts.concept_file import (
    CONCEPT_SUFFIX,
    DeltaFile,
    read_delta_file,
)
from atomdiff.concepts.library_index import ConceptInfo, LibraryIndex, normalize_name, scan
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some

_TENSOR_BYTES = 520  # what torch and Python keep about a tensor besides its numbers; measured


class _Held(NamedTuple):
    """A concept in memory."""

    info: ConceptInfo
    delta: DeltaFile
    size: int


class ConceptLibrary:
    """The concepts of a folder: `library["animals/cat"]` is what `animals/cat.atoms.safetensors` holds.

    All files with that ending are listed, and LoRA files of other programs, in subfolders, too; hidden ones are left
    out, links to files are followed, links to folders are not. A file is read when its concept is first asked for; the
    concepts asked for last stay in memory. Any number of threads may use a library at once: each file is read by one of
    them, the others wait for it and for nothing else. A `DeltaFile` is shared by all who ask for it and must not be
    changed.

    Length, iteration over the sorted names, and `in` tell what the last look at the folder found. What is new, changed
    or removed is noticed by `refresh`, and when a name or a phrase that nobody knows is asked for.

    Args:
        folder: where the files are.
        memory_budget: bytes that the concepts kept in memory may take; 0 keeps none.

    Raises:
        UserError: there is no such folder, or the budget is negative.
    """

    def __init__(self, folder: str | os.PathLike[str], memory_budget: int = 64 << 20) -> None:
        if memory_budget < 0:
            raise UserError(f"memory_budget={memory_budget}: expected bytes, at least 0")
        self.folder = Path(os.path.abspath(folder))
        self.memory_budget = memory_budget
        self._index = LibraryIndex([], {})  # never changed, only replaced: reading it takes no lock
        self._looks = 0
        self._refreshing = threading.Lock()
        self._lock = threading.Lock()  # of all below, and of replacing the index; never held while a file is read
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._reading: dict[ConceptInfo, Future[DeltaFile]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._index.concepts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.concepts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize_name(name) in self._index.concepts

    def __getitem__(self, name: str) -> DeltaFile:
        """The concept of that name, from memory or from its file; shared, not to be changed.

        Raises:
            UserError: there is no such concept, its file is damaged, or it is a LoRA file.
        """
        info = self.info(name)
        if info.is_lora:
            raise UserError(f"{name!r} is a LoRA file and holds no atoms: load it by its path, {info.path}")
        name = info.name
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.info is info:
                self._held.move_to_end(name)
                return held.delta
            is_first = info not in self._reading
            reading = self._reading.setdefault(info, Future())
        if is_first:
            self._read(info, reading)
        return reading.result()

    def info(self, name: str) -> ConceptInfo:
        """What the header of a concept says; its tensors are not read.

        Raises:
            UserError: there is no such concept, not even after another look at the folder.
        """
        if name not in self:
            self.refresh()
        if info := self._index.concepts.get(normalize_name(name)):
            return info
        raise UserError(self._unknown(name))

    def find(self, phrase: str) -> list[str]:
        """Names of the concepts with this trigger phrase, then of those with all of its words; case does not matter.

        Searched are the words of trigger phrases and the trigger words. Where nothing is found, the folder is looked at
        once more.
        """
        if names := self._index.find(phrase):
            return names
        self.refresh()
        return self._index.find(phrase)

    @property
    def damaged(self) -> dict[Path, str]:
        """Files and subfolders that cannot be used -> the reason, as of the last look at the folder."""
        return dict(self._index.damaged)

    @property
    def memory_used(self) -> int:
        """Bytes that the concepts kept in memory take, with all that Python and torch keep about them (estimated)."""
        with self._lock:
            return sum(held.size for held in self._held.values())

    def refresh(self) -> None:
        """Look at the folder: list new files, read the headers of changed ones again, forget removed ones.

        Files and subfolders that cannot be used are listed in `damaged`; a warning names those that were not before.

        Raises:
            UserError: the folder cannot be read; what the library knows stays as it was.
        """
        looks = self._looks
        with self._refreshing:
            if self._looks > looks + 1:  # another thread has begun and ended a look since this one was asked for
                return
            old, new = self._index, scan(self.folder, self._index)
            self._looks += 1
            with self._lock:
                self._index = new
                for name, held in list(self._held.items()):
                    if new.concepts.get(name) is not held.info:
                        del self._held[name]
        if reasons := [reason for path, reason in new.damaged.items() if old.damaged.get(path) != reason]:
            warnings.warn(f"left out of the library (.damaged lists all): {list_some(reasons)}", stacklevel=2)

    def _read(self, info: ConceptInfo, reading: Future[DeltaFile]) -> None:
        """Read a file on behalf of all threads that wait for `reading`."""
        try:
            delta = read_delta_file(info.path)
            self._keep(_Held(info, delta, _memory(delta)))
            reading.set_result(delta)
        except BaseException as error:
            reading.set_exception(error)
        finally:
            with self._lock:
                del self._reading[info]

    def _keep(self, new: _Held) -> None:
        """Make room for a concept, unless it has changed meanwhile or is larger than the whole budget."""
        with self._lock:
            if self._index.concepts.get(new.info.name) is not new.info or new.size > self.memory_budget:
                return
            self._held[new.info.name] = new
            used = sum(held.size for held in self._held.values())
            while used > self.memory_budget:
                _, oldest = self._held.popitem(last=False)
                used -= oldest.size

    def _unknown(self, name: str) -> str:
        index = self._index
        for ending in (CONCEPT_SUFFIX, ".safetensors"):
            if reason := index.damaged.get(self.folder / f"{name}{ending}"):
                return f"the concept {name!r} cannot be used: {reason}"
        ends = {other.rpartition("/")[2]: other for other in index.concepts}
        asked = name.removesuffix(CONCEPT_SUFFIX).rpartition("/")[2]
        near = [ends[end] for end in difflib.get_close_matches(asked, ends)]
        hint = f"near: {list_some(near)}" if near else "and none of a similar name"
        return f"there is no concept {name!r} among the {len(index.concepts)} in {self.folder}; {hint}"


def _memory(delta: DeltaFile) -> int:
    """Bytes that a concept takes with all that it holds; what several concepts share is counted for each."""
    total = 0
    pending: list[Any] = [vars(delta), vars(delta.config)]
    while pending:
        value = pending.pop()
        total += sys.getsizeof(value)
        if isinstance(value, Tensor):
            total += value.nbytes + _TENSOR_BYTES
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += value
    return total
