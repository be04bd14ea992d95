"""Files and folders that are there whole or not at all, whatever ends the program while it writes them.

What cannot be written, as on a full disk, is a `WriteError`.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from atomdiff.utils.errors import UserError

# Names of what is being written, and of folders with what is being replaced: hidden, not taken for an image or a
# checkpoint, and with the process that they belong to, so that what a killed process left can be told from what another
# one is writing. In containers all processes may have the same number, so each has a mark of its own, too.
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_MARK = secrets.token_hex(4)
_LEFT = re.compile(r"\.atomdiff-([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.(unfinished|replaced)")

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then run it again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or name another folder"),
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


class WriteError(UserError):
    """A file or folder cannot be written, as on a full disk; what was there is as it was.

    Args:
        path: the file or folder.
        reason: why.
        advice: what to do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, advice: str) -> None:
        super().__init__(f"{os.fspath(path)}: cannot be written ({reason}); {advice}")
        self.reason, self.advice = reason, advice


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a `with` block in which errors of the operating system, as on a full disk, mean that `path` is not written.

    Raises:
        WriteError: in their place.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (reason := _reason(error)) is None:
            raise
        code, text = _system_error(reason)
        raise WriteError(path, text, _ADVICE.get(code, "name another folder")) from error


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a `with` block that writes a file under the temporary name it gets; at the end it replaces `path` at once.

    If the block fails, `path` is as it was and nothing else is left. Folders that are missing are made.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_name())
    with _removed_on_error(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str], own: Sequence[str] | None = None) -> Iterator[Path]:
    """Make a `with` block that fills the empty folder it gets; at the end that takes the place of `path`.

    If the block fails, `path` is as it was and nothing else is left.

    Args:
        path: the folder.
        own: patterns, as for `Path.glob`, of what is replaced or removed there; what else it holds stays. None: all is.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_name())
    with _removed_on_error(path, temporary):
        temporary.mkdir(parents=True)
        yield temporary
        for entry in (temporary, *temporary.rglob("*")):
            sync = _sync_folder if entry.is_dir() else _sync
            sync(entry)
        if own is None or not target.is_dir():
            _exchange(temporary, target)
        else:
            _exchange_entries(temporary, target, own)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all."""
    with new_file(path) as file:
        file.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any, indent: int = 1) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_png(path: str | os.PathLike[str], image: Image.Image, **options: Any) -> None:
    """Write an image as a PNG, whole or not at all; the options are those of Pillow's PNG writer."""
    with new_file(path) as file:
        image.save(file, format="png", **options)


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """Write what took long to make; where it cannot be, it is kept in a folder for temporary files.

    Args:
        path: the file or folder.
        write: writes it whole or not at all, to the path that it gets.

    Raises:
        WriteError: it cannot be written to `path`; the message says where it is kept, if it is.
    """
    try:
        write(path)
    except WriteError as error:
        fallback = Path(tempfile.mkdtemp(prefix="atomdiff-")) / path.name
        try:
            write(fallback)
        except WriteError:
            fallback.parent.rmdir()
            raise error from None
        raise WriteError(path, error.reason, f"what was trained is in {fallback}: move it from there") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder at once, so that no half of it keeps its name."""
    left = folder.with_name(_name())
    with writing(folder):
        folder.rename(left)
        shutil.rmtree(left)


def remove_leftovers(folder: Path, alone: bool = False) -> None:
    """Remove what killed processes left half written in a folder; what they had replaced comes back.

    Args:
        folder: the folder.
        alone: whether no other machine writes there; else what such a one left stays, as it cannot be asked.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFT.fullmatch(entry.name)
        if found is None or not (_is_dead(int(found[2]), found[3]) if found[1] == _HOST else alone):
            continue
        for replaced in entry.iterdir() if found[4] == "replaced" else ():
            if not os.path.lexists(folder / replaced.name):
                replaced.rename(folder / replaced.name)
        _remove(entry)


def _is_dead(process: int, mark: str) -> bool:
    """Tell whether a process of this machine has ended."""
    if process == os.getpid():
        return mark != _MARK
    if os.name != "posix":  # elsewhere, asking would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def _name(kind: str = "unfinished") -> str:
    return f".atomdiff-{_HOST}-{os.getpid()}-{_MARK}-{secrets.token_hex(4)}.{kind}"


@contextmanager
def _removed_on_error(path: str | os.PathLike[str], temporary: Path) -> Iterator[None]:
    """Make a `with` block that writes `temporary` for `path`; if it fails, that is removed."""
    with writing(path):
        try:
            yield
        except BaseException:
            _remove(temporary)
            raise


def _reason(error: BaseException) -> BaseException | None:
    """Return what says why a file cannot be written, among an error and those that led to it; None for other errors."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    system = [each for each in chain if isinstance(each, OSError)]
    # safetensors and PyTorch's own writer do not pass on the error of the operating system
    hidden = [each for each in chain if isinstance(each, SafetensorError) or "inline_container" in str(each)]
    return next(iter(system + hidden), None)


def _system_error(reason: BaseException) -> tuple[int, str]:
    """Return the operating system's number and words for an error; 0 and what it says for one that has none."""
    text = " ".join(str(reason).split())[:200]
    if isinstance(reason, OSError) and reason.errno:
        return reason.errno, os.strerror(reason.errno)
    if found := re.search(r"os error (\d+)", text):  # as safetensors tells it
        return int(found[1]), os.strerror(int(found[1]))
    return 0, text


def _sync(file: Path) -> None:
    """Wait until the contents are on the disk: else the name could be there without them after a power failure."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where that can be asked for."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(new: Path, target: Path) -> None:
    """Put a file or folder in the place of another one, which may be missing."""
    if not os.path.lexists(target):
        new.rename(target)
        _sync_folder(target.parent)
        return
    aside = target.with_name(_name("replaced"))
    aside.mkdir()
    old = aside / target.name  # keeps its name, to which nothing could be added where it is long
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        aside.rmdir()
        raise
    _sync_folder(target.parent)
    _remove(aside)


def _exchange_entries(new: Path, target: Path, own: Sequence[str]) -> None:
    """Put what `new` holds into `target`; what matches a pattern goes or comes as a whole."""
    replaced, written = ({e.relative_to(at) for each in own for e in at.glob(each)} for at in (target, new))
    files = {file.relative_to(new) for file in new.rglob("*") if file.is_file()}
    written |= {file for file in files if written.isdisjoint(file.parents)}
    for entry in sorted(written):
        (target / entry).parent.mkdir(parents=True, exist_ok=True)
        _exchange(new / entry, target / entry)
    for entry in replaced - written:
        _remove(target / entry)
    _remove(new)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink()
    except OSError:
        pass
