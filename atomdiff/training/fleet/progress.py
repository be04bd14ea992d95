"""The course of a fleet: a live table on a terminal, a line for each event in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from atomdiff.training.fleet.queue import Event
from atomdiff.utils.progress import log

_ROWS = 20  # of workers that the table shows


class Progress:
    """A `with` block that shows what the workers of a fleet do, on the error stream.

    Args:
        total: How many subjects there are.
        done: How many of them are done already.
        num_workers: How many workers there are at most.
    """

    def __init__(self, total: int, done: int, num_workers: int) -> None:
        self._total, self._before, self._num_workers = total, done, num_workers
        self._done = self._failed = self._tries = 0
        self._seconds = 0.0  # of those that this call has done
        self._running: dict[int, tuple[str, float]] = {}
        console = Console(stderr=True)
        self._live = Live(console=console, get_renderable=self.table) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def started(self, name: str, worker: int) -> None:
        """Show that a worker begins with a subject."""
        self._running[worker] = name, time.monotonic()

    def ended(self, name: str, event: Event, again: bool) -> None:
        """Show how a try has ended."""
        self._running.pop(event.worker, None)
        if event.kind == "done":
            self._done += 1
            self._seconds += event.seconds
            self._say(f"{name}: done in {event.seconds:.1f} s by worker {event.worker}; {self.summary()}")
            return
        self._failed += not again
        then = "it is tried again" if again else self.summary()
        self._say(f"{name}: failed: {event.reason}; {then}")

    def summary(self) -> str:
        """Return how far the fleet is, and how long it will take at this rate."""
        done = self._before + self._done
        left = self._total - done - self._failed
        text = f"{done} of {self._total} done, {self._failed} failed"
        if left and self._done:
            text += f", about {left * self._seconds / self._done / self._num_workers / 60:.0f} min to go"
        return text

    def table(self) -> Table:
        """Return the table of the workers."""
        table = Table("worker", "subject", "seconds", title=self.summary())
        for worker, (name, since) in sorted(self._running.items())[:_ROWS]:
            table.add_row(str(worker), escape(name), f"{time.monotonic() - since:.0f}")
        if (more := len(self._running) - _ROWS) > 0:
            table.add_row("...", f"and {more} more", "")
        return table

    def _say(self, line: str) -> None:
        if self._live:
            self._live.console.print(escape(line), highlight=False)
        else:
            log(line)
