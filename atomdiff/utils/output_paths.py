"""Places for results: whether they can be written, and whether they are not what is read."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from atomdiff.utils.errors import UserError


def refuse_overlap(writes: Mapping[str, str | Path], reads: Mapping[str, str | Path], inside: bool = True) -> None:
    """Refuse to write to what is read.

    Args:
        writes: What each is called -> a file or folder that is written.
        reads: What each is called -> a file or folder that is read.
        inside: Whether a folder is read with all that is in it, and one that is not there may be elsewhere.

    Raises:
        UserError: Two are the same, or one that is written is inside one that is read.
    """
    for output, written in writes.items():
        target = _resolved(written, output)
        for source, read in reads.items():
            origin = _resolved(read, source)
            if inside and not origin.exists():  # it may be on the Hub
                continue
            if target == origin or (target.exists() and origin.exists() and target.samefile(origin)):
                mixed = "what is written there would mix with what is read; name another"
                raise UserError(f"{output}={str(written)!r} is {source}, too: {mixed}")
            if inside and origin.is_dir() and target.is_relative_to(origin):
                raise UserError(f"{output}={str(written)!r} is inside {source} ({read}); name another")


def _resolved(path: str | Path, what: str) -> Path:
    try:
        resolved = Path(path).resolve()
        resolved.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with null characters, or a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}={str(path)!r}: cannot be a path ({reason}); name another") from error
    return resolved


def check_writable(folder: Path, what: str, name: str = "probe") -> None:
    """Make a folder, and try whether a file of that name can be written in it.

    Raises:
        UserError: It cannot; `what` stands first in the message.
    """
    probe = folder / f"{name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:  # of null characters in names
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: {name} cannot be written there ({reason}); name another folder") from error
