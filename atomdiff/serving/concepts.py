"""The concepts of a server: those of its library, kept as they were for requests that use them."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, ConceptFile, read_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.library_index import ConceptInfo, LibraryFolderError
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.concept_source import ConceptSource, library_source
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import check_concept_name, normalize_name
from atomdiff.utils.untrusted import printable, read_safetensors_header

_TRIES = 10  # to read a file that others replace
_MAX_THUMBNAIL = 1 << 20  # characters of a data URL


class ServedConcepts:
    """Finds the concepts of requests in a library; a request keeps them, also where files change or go.

    Methods may be called in any thread.

    Args:
        library: the concepts, in a folder that others may change, too.
    """

    def __init__(self, library: ConceptLibrary) -> None:
        self.library = library
        self._sources: weakref.WeakValueDictionary[ConceptInfo, ConceptSource] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def find(self, weights: Mapping[str, Any]) -> list[tuple[ConceptSource, AdapterWeight]]:
        """Return the concepts of a request with their weights, their contents in memory.

        Args:
            weights: name -> adapter weight as `AdapterWeight.read` takes it.

        Raises:
            UserError: there is no such concept, its file is damaged, or its weight cannot be used.
        """
        read = {name: _read_weight(name, value) for name, value in weights.items()}
        return [(self._source(name), weight) for name, weight in read.items()]

    def info(self, name: str) -> ConceptInfo:
        """Return what the header of a concept says, as it is now.

        Raises:
            UserError: there is no such concept.
        """
        info = self.library.info(name)
        if not _is_current(info):
            self.library.refresh()
            info = self.library.info(name)
        return info

    def add(self, name: str, data: bytes, check: Callable[[ConceptFile], object], *, overwrite: bool = False) -> str:
        """Put a concept file into the library, once all of it has been checked.

        Args:
            name: its name; no folder.
            data: its contents.
            check: raises `UserError` for concepts that are not to be taken.
            overwrite: replace a concept of this name; requests that use it keep the old one.

        Returns:
            The name, without endings.

        Raises:
            UserError: the name cannot be one, or the file is no concept file, or damaged.
            FileExistsError: there is a concept of this name, or a LoRA file, which is not replaced.
            LibraryFolderError: the folder cannot be written to.
        """
        name = normalize_name(name.removesuffix(CONCEPT_SUFFIX))
        check_concept_name(name)
        target = self.library.folder / f"{name}{CONCEPT_SUFFIX}"
        exists = f"there is a concept {name!r} already: choose another name, or set overwrite"
        if name in self.library:
            if self.library.info(name).is_lora:
                raise FileExistsError(f"there is a LoRA file {name!r} already: choose another name, or delete it first")
            if not overwrite:
                raise FileExistsError(exists)
        with _writing():
            handle, temporary = tempfile.mkstemp(prefix=".upload-", dir=self.library.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                try:
                    check(read_concept_file(temporary))
                except UserError as error:
                    raise UserError(str(error).replace(temporary, f"the concept {name!r}")) from error
                os.chmod(temporary, 0o644)
                if overwrite:
                    os.replace(temporary, target)
                else:
                    try:
                        _name_new(temporary, target)
                    except FileExistsError as error:
                        raise FileExistsError(exists) from error
            finally:
                Path(temporary).unlink(missing_ok=True)
        self.library.refresh()
        return name

    def delete(self, name: str) -> None:
        """Delete the file of a concept; requests that use it are finished with it.

        Raises:
            UserError: there is no such concept.
            LibraryFolderError: the folder cannot be written to.
        """
        path = self.info(name).path
        with _writing():
            path.unlink(missing_ok=True)
        self.library.refresh()

    def _source(self, name: str) -> ConceptSource:
        with self._lock:
            for _ in range(_TRIES):
                info = self.info(name)
                if (source := self._sources.get(info)) is not None:
                    return source
                try:
                    source = _keep(library_source(self.library, name))
                except (OSError, UserError):
                    if _is_current(info):
                        raise
                    continue  # it was replaced or deleted meanwhile
                if _is_current(info):  # so all of it is of one file
                    self._sources[info] = source
                    return source
        raise UserError(f"the concept {name!r} is replaced again and again while it is read: send the request later")


def _is_current(info: ConceptInfo) -> bool:
    """Tell whether the file is still that of which a header was read."""
    try:
        status = info.path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns, status.st_ino) == (info.size, info.mtime_ns, info.inode)


def _read_weight(name: str, value: Any) -> AdapterWeight:
    try:
        return AdapterWeight.read(value)
    except UserError as error:
        raise UserError(f"concepts: {printable(name)}: {error}") from error


@contextmanager
def _writing() -> Iterator[None]:
    """Say what is wrong where a library's folder cannot be written to, as when the disk is full."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LibraryFolderError(f"the library cannot be written to ({reason}); tell who runs this server") from error


def _name_new(file: str, target: Path) -> None:
    """Give a file a name that no file has yet.

    Raises:
        FileExistsError: there is a file of this name.
    """
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # as on shared file systems without hard links
        open(target, "xb").close()
        os.replace(file, target)


def thumbnail(info: ConceptInfo) -> str | None:
    """Return the thumbnail in a concept's file, a data URL with an image; None: it has none, or is gone."""
    try:
        found = read_safetensors_header(info.path)[0].get("modelspec.thumbnail", "")
    except UserError:
        return None
    return found if found.startswith("data:image/") and len(found) <= _MAX_THUMBNAIL else None


def _keep(source: ConceptSource) -> ConceptSource:
    """Return a source that no longer needs its file; of LoRA files a copy is kept as long as the source."""
    if source.read is None:
        folder = Path(tempfile.mkdtemp(prefix="atomdiff-lora-"))
        kept = replace(source, path=Path(shutil.copy(source.path, folder)))
        weakref.finalize(kept, shutil.rmtree, folder, ignore_errors=True)
    else:
        contents = source.read()
        kept = replace(source, read=lambda: contents)
    _ = kept.schedule, kept.sha256  # read now, and kept
    return kept
