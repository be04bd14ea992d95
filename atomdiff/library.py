"""A folder of thousands of concept files: an index of all of them, and in memory those that were asked for last."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from atomdiff.delta_file import DeltaFile, check_words, read_delta_file, read_header, some, split_token_key
from atomdiff.errors import UserError

ENDING = ".atoms.safetensors"
_READERS = 8  # threads that read headers
_TENSOR_BYTES = 520  # what torch and Python keep about a tensor besides its numbers; measured


class _Stamp(NamedTuple):
    """What tells a changed file from an unchanged one; a file put in another's place has another inode."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ConceptInfo:
    """What the header of a concept file says."""

    name: str
    """Path in the library's folder, with `/` and without the ending."""
    path: Path
    """The file."""
    trigger_phrase: str
    """What to write in a prompt to get the concept."""
    trigger_words: tuple[str, ...]
    """Words whose embeddings are in the file."""
    base_model: str
    """Name or path of the base as it was given; only a text, never opened."""
    size: int
    """Bytes of the file."""
    mtime_ns: int
    """When the file was last changed, in nanoseconds."""
    inode: int
    """Number of the file in its file system."""


class _Broken(NamedTuple):
    """A file or subfolder that cannot be used."""

    stamp: _Stamp | None  # None: try again at every look
    reason: str


class _Held(NamedTuple):
    """A concept in memory."""

    info: ConceptInfo
    delta: DeltaFile
    size: int


class ConceptLibrary:
    """The concepts of a folder: `library["animals/cat"]` is what `animals/cat.atoms.safetensors` holds.

    All files with that ending are listed, in subfolders, too; hidden ones are left out, links to files are followed,
    links to folders are not. A file is read when its concept is first asked for; the concepts asked for last stay in
    memory. Any number of threads may use a library at once: each file is read by one of them, the others wait for it
    and for nothing else. A `DeltaFile` is shared by all who ask for it and must not be changed.

    What was new, changed or removed in the folder is noticed by `refresh`, and when a name or a phrase that nobody
    knows is asked for.

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
        self._index = _Index({}, {})  # never changed, only replaced: reading it takes no lock
        self._scans = 0
        self._refreshing = threading.Lock()
        self._lock = threading.Lock()  # of all below, and of replacing the index; never held while a file is read
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._held_bytes = 0
        self._reading: dict[ConceptInfo, Future[DeltaFile]] = {}
        self.refresh()

    def __len__(self) -> int:
        """Number of concepts, as of the last look at the folder."""
        return len(self._index.concepts)

    def __iter__(self) -> Iterator[str]:
        """The names, sorted, as of the last look at the folder."""
        return iter(self._index.concepts)

    def __contains__(self, name: object) -> bool:
        """Tell whether a name was there at the last look at the folder."""
        return name in self._index.concepts

    def __getitem__(self, name: str) -> DeltaFile:
        """The concept of that name, from memory or from its file; shared, not to be changed.

        Raises:
            UserError: there is no such concept, or its file is damaged.
        """
        while True:
            info = self.info(name)
            with self._lock:
                held = self._held.get(name)
                if held is not None and held.info is info:
                    self._held.move_to_end(name)
                    return held.delta
                other = self._reading.get(info)
                if other is None:
                    mine = self._reading[info] = Future()
            if other is None:
                return self._read(info, mine)
            try:
                return other.result()
            except CancelledError:  # it failed elsewhere: try here
                continue

    def info(self, name: str) -> ConceptInfo:
        """What the header of a concept says; its tensors are not read.

        Raises:
            UserError: there is no such concept, not even after another look at the folder.
        """
        info = self._index.concepts.get(name)
        if info is None:
            self.refresh()
            info = self._index.concepts.get(name)
        if info is None:
            raise UserError(self._unknown(name))
        return info

    def find(self, phrase: str) -> list[str]:
        """Names of the concepts with this trigger phrase, then of those with all of its words; case does not matter.

        Searched are the words of trigger phrases and the trigger words. Where nothing is found, the folder is looked at
        once more.
        """
        names = self._index.find(phrase)
        if not names:
            self.refresh()
            names = self._index.find(phrase)
        return names

    @property
    def damaged(self) -> dict[Path, str]:
        """Files and subfolders that cannot be used -> the reason, as of the last look at the folder."""
        return {self.folder / name: broken.reason for name, broken in self._index.damaged.items()}

    @property
    def memory_used(self) -> int:
        """Bytes that the concepts kept in memory take, with all that Python and torch keep about them (estimated)."""
        with self._lock:
            return self._held_bytes

    def refresh(self) -> None:
        """Look at the folder: list new files, read the headers of changed ones again, forget removed ones.

        Files and subfolders that cannot be used are listed in `damaged`; a warning names those that were not before.

        Raises:
            UserError: the folder cannot be read; what the library knows stays as it was.
        """
        seen = self._scans
        with self._refreshing:
            if self._scans > seen:  # another thread has begun and ended a look since this one was asked for
                return
            self._scans += 1
            old = self._index
            try:
                new = _look(self.folder, old)
            except BaseException:
                self._scans -= 1
                raise
            with self._lock:
                self._index = new
                for name, held in list(self._held.items()):
                    if new.concepts.get(name) is not held.info:
                        self._drop(name)
        broken = [name for name, entry in new.damaged.items() if old.damaged.get(name) != entry]
        if broken:
            reasons = [new.damaged[name].reason for name in broken]
            warnings.warn(f"left out of the library (.damaged lists all): {some(reasons)}", stacklevel=2)

    def _read(self, info: ConceptInfo, reading: Future[DeltaFile]) -> DeltaFile:
        """Read a file on behalf of all threads that wait for `reading`, and make room for it."""
        try:
            delta = read_delta_file(info.path)
            size = _memory(delta)
        except BaseException:
            with self._lock:
                del self._reading[info]
            reading.cancel()
            raise
        with self._lock:
            del self._reading[info]
            fits = size <= self.memory_budget
            if fits and self._index.concepts.get(info.name) is info:  # it may have changed meanwhile
                self._held[info.name] = _Held(info, delta, size)
                self._held_bytes += size
                while self._held_bytes > self.memory_budget:
                    self._drop(next(iter(self._held)))
        reading.set_result(delta)
        return delta

    def _drop(self, name: str) -> None:
        self._held_bytes -= self._held.pop(name).size

    def _unknown(self, name: str) -> str:
        index = self._index
        if broken := index.damaged.get(f"{name}{ENDING}"):
            return f"the concept {name!r} cannot be used: {broken.reason}"
        wanted = name.removesuffix(ENDING)
        last = wanted.rpartition("/")[2]
        near = [other for other in index.concepts if other.rpartition("/")[2] == last]
        near += difflib.get_close_matches(wanted, index.concepts)
        hint = f"near: {some(list(dict.fromkeys(near)))}" if near else "and none of a similar name"
        return f"there is no concept {name!r} among the {len(index.concepts)} in {self.folder}; {hint}"


class _Index:
    """What is known of a folder at one time."""

    def __init__(self, concepts: dict[str, ConceptInfo], damaged: dict[str, _Broken]) -> None:
        self.concepts = concepts
        self.damaged = damaged
        self._phrases: dict[str, list[str]] = {}
        self._words: dict[str, set[str]] = {}
        for name, info in concepts.items():
            if phrase := _plain(info.trigger_phrase):
                self._phrases.setdefault(phrase, []).append(name)
            for word in _words(" ".join((info.trigger_phrase, *info.trigger_words))):
                self._words.setdefault(word, set()).add(name)

    def find(self, phrase: str) -> list[str]:
        """Names with the phrase, then with all of its words."""
        names = dict.fromkeys(self._phrases.get(_plain(phrase), ()))
        if found := sorted((self._words.get(word, set()) for word in _words(phrase)), key=len):
            names |= dict.fromkeys(sorted(found[0].intersection(*found[1:])))
        return list(names)


def _look(folder: Path, old: _Index) -> _Index:
    """The index of a folder; the headers of files that have not changed are not read again."""
    files, unreadable = _list(folder)
    known: dict[str, ConceptInfo | _Broken] = {}
    for name, stamp in files.items():
        info, broken = old.concepts.get(name), old.damaged.get(name + ENDING)
        if info is not None and (info.size, info.mtime_ns, info.inode) == stamp:
            known[name] = info
        elif broken is not None and broken.stamp == stamp:
            known[name] = broken
    missing = [name for name in files if name not in known]
    with ThreadPoolExecutor(_READERS) as pool:  # they wait for the disk together
        for name, found in zip(missing, pool.map(lambda name: _info(folder, name, files[name]), missing), strict=True):
            if found is not None:
                known[name] = found
    concepts = {name: found for name, found in sorted(known.items()) if isinstance(found, ConceptInfo)}
    damaged = {name: _Broken(None, reason) for name, reason in unreadable.items()}
    damaged |= {name + ENDING: found for name, found in sorted(known.items()) if isinstance(found, _Broken)}
    same = len(concepts) == len(old.concepts) and all(old.concepts.get(name) is concepts[name] for name in concepts)
    return old if same and damaged == old.damaged else _Index(concepts, damaged)


def _info(folder: Path, name: str, stamp: _Stamp) -> ConceptInfo | _Broken | None:
    """What a header says; None if the file is gone since it was listed."""
    path = folder / (name + ENDING)
    try:
        metadata, keys = read_header(path)
        words: dict[str, dict[str, Tensor]] = {split_token_key(key)[0]: {} for key in keys if key.startswith("token.")}
        check_words(path, words)
    except UserError as error:
        passing = isinstance(error.__cause__, OSError)  # such as too many open files: try again next time
        return _Broken(None if passing else stamp, str(error)) if path.exists() else None
    return ConceptInfo(
        name=name,
        path=path,
        trigger_phrase=metadata.get("trigger_phrase", ""),
        trigger_words=tuple(map(sys.intern, sorted(words))),  # the same few in thousands of files
        base_model=sys.intern(metadata.get("base_model", "")),
        size=stamp.size,
        mtime_ns=stamp.mtime_ns,
        inode=stamp.inode,
    )


def _list(folder: Path) -> tuple[dict[str, _Stamp], dict[str, str]]:
    """Name -> stamp of the concept files below a folder, and subfolder -> why it cannot be read."""
    files: dict[str, _Stamp] = {}
    unreadable: dict[str, str] = {}
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{below}{entry.name}/")
                    elif entry.name.endswith(ENDING) and (stamp := _stamp(entry)):
                        files[below + entry.name.removesuffix(ENDING)] = stamp
        except OSError as error:
            if not below:
                raise UserError(f"folder={str(folder)!r} cannot be read as a folder of concepts: {error}") from error
            if not isinstance(error, FileNotFoundError):  # gone since it was listed
                unreadable[below] = f"cannot read {folder / below}: {error}"
    return files, unreadable


def _stamp(entry: os.DirEntry[str]) -> _Stamp | None:
    """The stamp of a file; None for pipes and the like, and links to nothing."""
    try:
        found = entry.stat()
    except OSError:
        return None
    return _Stamp(found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _memory(delta: DeltaFile) -> int:
    """Bytes that a concept takes with all that it holds; what several concepts share is counted for each."""
    total = 0
    pending: list[Any] = [vars(delta)]
    while pending:
        value = pending.pop()
        total += sys.getsizeof(value)
        if isinstance(value, (str, float)):  # most of all
            continue
        if isinstance(value, Mapping):
            pending += chain.from_iterable(value.items())
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += value
        elif isinstance(value, Tensor):
            total += value.nbytes + _TENSOR_BYTES
        elif dataclasses.is_dataclass(value):
            pending.append(vars(value))
    return total


def _plain(phrase: str) -> str:
    return " ".join(phrase.casefold().split())


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
