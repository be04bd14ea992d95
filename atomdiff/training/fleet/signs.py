"""Signs of life: a worker touches a file in its subject's folder as it gets on; where no sign comes, it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atomdiff.utils.progress import calling_on_progress

SIGN_FILE = ".alive"

_SECONDS = 1.0  # between two signs, at least
_CHECKS = 20  # in the time after which a worker hangs


@contextmanager
def giving_signs(folder: Path) -> Iterator[None]:
    """Make a `with` block in which each phase, step and image is a sign of life: the time of a file in a folder.

    A folder that cannot be written is left to those who write results there.
    """
    file, last = folder / SIGN_FILE, -_SECONDS

    def give() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS:
            last = now
            with suppress(OSError):
                file.touch()

    with calling_on_progress(give):
        give()
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def last_sign(folder: Path) -> int:
    """Return the time of the last sign of life in a folder, by the clock of the worker's machine; 0: there was none."""
    try:
        return (folder / SIGN_FILE).stat().st_mtime_ns
    except OSError:
        return 0


class Watch:
    """Which subjects' workers hang: by the clock of this machine, the last sign of life has been the same for too long.

    Args:
        sign: Returns the last sign of a subject; any value that differs from the one before.
        timeout: Seconds after which a worker without a sign hangs. None: never.
        clock: Returns seconds.
    """

    def __init__(
        self, sign: Callable[[str], Any], timeout: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout, self._sign, self._clock = timeout, sign, clock
        self._since: dict[str, tuple[Any, float]] = {}
        self._next_check = 0.0

    def begin(self, name: str) -> None:
        """Watch a subject from now on."""
        self._since[name] = self._sign(name), self._clock()

    def end(self, name: str) -> None:
        """Watch a subject no longer."""
        del self._since[name]

    def hung(self) -> list[str]:
        """Return the subjects whose workers hang. The signs are looked at a few times in `timeout` only."""
        now = self._clock()
        if self.timeout is None or now < self._next_check:
            return []
        self._next_check = now + self.timeout / _CHECKS
        for name, (before, _) in self._since.items():
            if (sign := self._sign(name)) != before:
                self._since[name] = sign, now
        return [name for name, (_, since) in self._since.items() if now - since > self.timeout]
