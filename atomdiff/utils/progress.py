"""What programs show of phases that take long: a bar on a terminal, one line in a log."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_listeners: list[Callable[[], None]] = []


@contextmanager
def calling_on_progress(listener: Callable[[], None]) -> Iterator[None]:
    """Make a `with` block in which a function is called whenever a phase is named, or something in one was counted.

    It is called by the thread that makes progress, also where nothing is shown.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def note_progress() -> None:
    """Say that something was done, in a phase that counts nothing."""
    for listener in _listeners:
        listener()


def log(phase: str) -> None:
    """Name a phase whose progress cannot be counted, such as loading."""
    note_progress()
    tqdm.write(phase, file=sys.stderr)  # beside a bar that stands there
    sys.stderr.flush()


class ProgressBar(tqdm):  # type: ignore[misc]
    """tqdm's bar where errors go to a terminal; elsewhere one line that names the phase and what it counts.

    Args:
        iterable: what to count; None: count with `update`.
        desc: what the phase does.
        total: how many there are, if the iterable cannot tell.
        unit: what is counted, in the plural.
        disable: show nothing at all, as on other processes than the first.
        **options: of tqdm.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str = "",
        total: int | None = None,
        *,
        unit: str = "steps",
        disable: bool = False,
        **options: Any,
    ) -> None:
        terminal = sys.stderr.isatty()
        if not disable and not terminal:
            count = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
            done = f", {options['initial']} of them done" if options.get("initial") else ""
            log(desc if count is None else f"{desc}: {count} {unit}{done}")
        super().__init__(iterable, desc, total, unit=f" {unit}", disable=disable or not terminal, **options)

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            note_progress()
            yield each

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more; return whether the bar was drawn anew."""
        note_progress()
        drawn: bool | None = super().update(n)
        return drawn
