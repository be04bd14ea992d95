"""The index of a folder of concept files: names, headers and the words they are found by."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, read_header
from atomdiff.concepts.lora_file import has_lora_keys
from atomdiff.concepts.token_keys import check_words, split_token_key
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name
from atomdiff.utils.untrusted import read_safetensors_header

_NUM_THREADS = 8  # that read headers

_Stamp = tuple[int, int, int]  # size, mtime_ns, inode: what tells a changed file from an unchanged one


@dataclass(frozen=True, slots=True)
class ConceptInfo:
    """What the header of a concept file says."""

    name: str
    """Path within the library's folder, with `/` and without the ending, in Unicode normal form NFC."""
    path: Path
    """The file."""
    trigger_phrase: str
    """What to write in a prompt to get the concept."""
    trigger_words: tuple[str, ...]
    """Words whose embeddings are in the file."""
    base_model: str
    """Name or path of the base in the file; never opened."""
    size: int
    """Bytes of the file."""
    mtime_ns: int
    """When the file was last changed, in nanoseconds."""
    inode: int
    """Inode number; a file that replaces another has a different one."""
    is_lora: bool = False
    """Whether it is a LoRA file of another program, which is loaded by its path."""


class LibraryFolderError(UserError):
    """The folder of a library cannot be read or written to."""


class LibraryIndex:
    """What a scan of the folder found; immutable."""

    def __init__(
        self, infos: Iterable[ConceptInfo], damaged: dict[Path, str], unrelated: Mapping[str, _Stamp] | None = None
    ) -> None:
        self.unrelated = unrelated or {}  # files that are neither concepts nor LoRAs
        self.concepts = {info.name: info for info in sorted(infos, key=lambda info: info.name)}
        self.damaged = dict(sorted(damaged.items()))
        self._names: dict[str, set[str]] = {}  # by word
        for name, info in self.concepts.items():
            for text in (info.trigger_phrase, *info.trigger_words):
                for word in _words(text):
                    self._names.setdefault(word, set()).add(name)

    def find(self, phrase: str) -> list[str]:
        """Return names with this trigger phrase, then those with all of its words."""
        by_word = [self._names.get(word, set()) for word in _words(phrase)] or [set()]
        names, wanted = sorted(min(by_word, key=len).intersection(*by_word)), _normalize_phrase(phrase)
        return sorted(names, key=lambda name: _normalize_phrase(self.concepts[name].trigger_phrase) != wanted)


def scan(folder: Path, old: LibraryIndex) -> LibraryIndex:
    """Scan a folder; headers of unchanged files are not read again, except damaged ones."""
    stamps, damaged = _list_files(folder)
    known = {str(info.path): info for info in old.concepts.values()}
    infos = {file: info for file, info in known.items() if stamps.get(file) == (info.size, info.mtime_ns, info.inode)}
    unrelated = {file: stamp for file, stamp in old.unrelated.items() if stamps.get(file) == stamp}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # they wait for the disk together
        new = [file for file in stamps if file not in infos and file not in unrelated]
        reading = {file: pool.submit(_read_info, folder, Path(file), stamps[file]) for file in new}
    for file, future in reading.items():
        try:
            if (info := future.result()) is not None:
                infos[file] = info
            else:
                unrelated[file] = stamps[file]
        except UserError as error:
            if os.path.exists(file):  # not gone since it was listed
                damaged[Path(file)] = str(error)
    first: dict[str, str] = {}
    for file in sorted(infos, key=lambda file: (infos[file].is_lora, file)):
        if (namesake := first.setdefault(infos[file].name, file)) != file:
            damaged[Path(file)] = f"{file} has the same name in the library as {namesake}: rename one"
            del infos[file]
    same = (infos, damaged, unrelated) == (known, old.damaged, old.unrelated)
    return old if same else LibraryIndex(infos.values(), damaged, unrelated)


def _read_info(folder: Path, path: Path, stamp: _Stamp) -> ConceptInfo | None:
    """Read the header of a file; None: it is neither a concept nor a LoRA."""
    is_lora = not path.name.endswith(CONCEPT_SUFFIX)
    metadata, keys = read_safetensors_header(path) if is_lora else read_header(path)
    if is_lora and not has_lora_keys(keys):
        return None
    words = sorted({split_token_key(key)[0] for key in keys if key.startswith("token.")})
    check_words(path, words)
    name = path.relative_to(folder).as_posix().removesuffix(".safetensors" if is_lora else CONCEPT_SUFFIX)
    phrase = metadata.get("trigger_phrase") or metadata.get("modelspec.trigger_phrase", "")
    base_model = metadata.get("base_model") or metadata.get("ss_sd_model_name", "")
    return ConceptInfo(normalize_name(name), path, phrase, tuple(words), base_model, *stamp, is_lora)


def _list_files(folder: Path) -> tuple[dict[str, _Stamp], dict[Path, str]]:
    """Return safetensors file -> its stamp, and unreadable subfolder -> the reason."""
    stamps: dict[str, _Stamp] = {}
    unreadable: dict[Path, str] = {}

    def note(error: OSError) -> None:
        if error.filename == str(folder):
            raise LibraryFolderError(
                f"folder={error.filename!r} cannot be read as a folder of concepts: {error}"
            ) from error
        if not isinstance(error, FileNotFoundError):  # gone since it was listed
            unreadable[Path(error.filename)] = f"cannot read {error.filename}: {error}"

    for below, subfolders, files in os.walk(folder, onerror=note):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.endswith(".safetensors") and not name.startswith("."):
                file = os.path.join(below, name)
                with suppress(OSError):  # a link to nothing, or gone since it was listed
                    status = os.stat(file)
                    if stat.S_ISREG(status.st_mode):  # no pipe, which would be waited for
                        stamps[file] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return stamps, unreadable


def _normalize_phrase(phrase: str) -> str:
    return " ".join(phrase.casefold().split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold()) or text.split()  # the latter of a text of nothing but signs
