"""A folder that one process at a time writes to."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atomdiff.utils.atomic import remove_leftovers, writing
from atomdiff.utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make a `with` block in which no other block of this kind, in any process, has the folder.

    The lock ends with the process, however that ends. What killed processes left half written is removed first.

    Args:
        folder: made if missing.

    Raises:
        UserError: another process has it; the message says which.
        WriteError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, locked = _take(folder)
        remove_leftovers(folder, alone=locked)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            (folder / LOCK_FILE).unlink()
        os.close(handle)


@contextmanager
def wait_for_folder(folder: Path) -> Iterator[None]:
    """Make a `with` block that waits until no other process is in one for the same folder, where there are such locks.

    Args:
        folder: of which a few files are read or written together; not for work that takes long.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _take(folder: Path) -> tuple[int, bool]:
    """Return the open file, and whether it is locked: some file systems have no locks."""
    file = folder / LOCK_FILE
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(handle)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            advice = "wait until it ends, stop it, or name another output_dir"
            raise UserError(f"{folder}: another run is writing there ({holder}); {advice}") from None
        if os.path.exists(file) and os.path.samestat(os.fstat(handle), os.stat(file)):
            break
        os.close(handle)  # it was let go, and removed, in between
    try:
        os.truncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    except OSError:
        file.unlink()
        os.close(handle)
        raise
    return handle, locked


def _lock(handle: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True
