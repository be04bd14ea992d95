"""The queue: which worker trains which subject, what is tried again, and what becomes of workers that are lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from atomdiff.training.fleet.signs import Watch
from atomdiff.utils.errors import UserError

_STARTS = 3  # of a worker that ends before it is ready, in a row
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Event:
    """What has happened to a worker: it is ready for its first subject, has ended one well or badly, or is lost."""

    worker: int
    kind: Literal["ready", "done", "failed", "lost"]
    seconds: float = 0.0
    """What training took, with all that belongs to it."""
    reason: str = ""
    """Why it failed or was lost."""


class WorkerPool(Protocol):
    """Workers, each known by a number, that train one subject at a time: the seam for other kinds of clusters."""

    def start(self, worker: int) -> None:
        """Start a worker, also in the place of one that was lost; "ready" or "lost" follows."""

    def assign(self, worker: int, name: str) -> None:
        """Let a worker that waits train a subject; "done", "failed" or "lost" follows."""

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what has happened, once something has or the time is over."""

    def kill(self, worker: int) -> None:
        """End a worker that hangs, without waiting for it; no event of it follows."""

    def close(self) -> None:
        """End all workers; those that train save a checkpoint first, if they can."""


class Listener(Protocol):
    """What is told of the course of a fleet."""

    def started(self, name: str, worker: int) -> None:
        """A worker begins with a subject."""

    def ended(self, name: str, event: Event, again: bool) -> None:
        """A subject is done, or a try has failed, to be followed by another one or not."""


class Queue:
    """Subjects that wait, and the workers that take them.

    A subject that failed, or whose worker was lost, comes last and goes to a worker that has not tried it, unless all
    that are left have. A worker that hangs is killed, and lost.

    Args:
        names: The subjects.
        pool: Trains them.
        num_workers: How many at a time, at most.
        max_tries: Of a subject.
        listener: Is told.
        watch: Tells which workers hang. None: all that train are trusted.
    """

    def __init__(
        self,
        names: Sequence[str],
        pool: WorkerPool,
        num_workers: int,
        max_tries: int,
        listener: Listener,
        watch: Watch | None = None,
    ) -> None:
        self.pool, self.max_tries, self.listener = pool, max_tries, listener
        self._watch = watch or Watch(lambda _: None, timeout=None)
        self._waiting = deque(names)
        self._tried: dict[str, list[int]] = {}
        self._running: dict[int, str] = {}
        self._idle: dict[int, None] = {}  # in the order in which they became so
        self._alive: set[int] = set()
        self._failed_starts = dict.fromkeys(range(min(num_workers, len(names))), 0)

    @property
    def running(self) -> list[str]:
        """The subjects that workers train now, or did when it was stopped."""
        return [*self._running.values()]

    def run(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Train until all subjects are done or given up, or until `stopping`.

        Raises:
            UserError: No worker is left.
        """
        for worker in self._failed_starts:
            self._start(worker)
        while (self._waiting or self._running) and not stopping():
            for worker in list(self._idle):
                self._assign(worker)
            for event in self.pool.wait(_POLL_SECONDS):
                self._take(event)
            self._kill_hung()

    def _kill_hung(self) -> None:
        """Kill the workers that hang; their subjects are tried again as those of lost ones."""
        workers = {name: worker for worker, name in self._running.items()}
        for name in self._watch.hung():
            worker = workers[name]
            self.pool.kill(worker)
            reason = f"worker {worker} gave no sign of life for {self._watch.timeout:g} seconds, and was killed"
            self._take(Event(worker, "lost", reason=reason))

    def _start(self, worker: int) -> None:
        self._alive.add(worker)
        self.pool.start(worker)

    def _take(self, event: Event) -> None:
        """Note what has happened."""
        worker = event.worker
        name = self._running.pop(worker, None)
        if name is not None:
            self._watch.end(name)
            again = event.kind != "done" and len(self._tried[name]) < self.max_tries
            if again:
                self._waiting.append(name)
            self.listener.ended(name, event, again)
        if event.kind != "lost":
            self._failed_starts[worker] = 0
            self._idle[worker] = None
            return
        self._alive.discard(worker)
        was_ready = name is not None or worker in self._idle
        self._idle.pop(worker, None)
        self._failed_starts[worker] = 0 if was_ready else self._failed_starts[worker] + 1
        if self._waiting and self._failed_starts[worker] < _STARTS:
            self._start(worker)
        elif self._waiting and not self._alive:
            raise UserError(f"no worker can be started: {event.reason}")

    def _assign(self, worker: int) -> None:
        """Give a worker that waits the first subject that it may try."""
        for index, name in enumerate(self._waiting):
            tried = self._tried.setdefault(name, [])
            if worker not in tried or self._alive.issubset(tried):
                del self._waiting[index]
                tried.append(worker)
                del self._idle[worker]
                self._running[worker] = name
                self.listener.started(name, worker)
                self._watch.begin(name)
                self.pool.assign(worker, name)
                return
