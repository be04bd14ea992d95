"""The jobs of an engine that are not done: many threads add them, one works on them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from atomdiff.serving.errors import EngineClosedError, QueueFullError, RequestTimeoutError
from atomdiff.serving.job import Job
from atomdiff.utils.errors import UserError


@dataclass
class EngineStats:
    """What an engine has done so far."""

    finished: int = 0
    """Images."""
    failed: int = 0
    """Requests that could not be fulfilled."""
    cancelled: int = 0
    """Requests that were withdrawn."""
    timed_out: int = 0
    """Requests that were not done in time."""
    calls: int = 0
    """Calls of the denoiser."""
    steps: int = 0
    """Denoising steps of images; divided by `calls` it is the mean batch size."""


class JobQueue:
    """Jobs that wait or run; methods may be called in any thread.

    Args:
        max_batch: images that the engine denoises together.
        max_queue: images that may wait beside them.
        longest_wait: seconds after which to try again, at most, for a request that found the queue full.
        stats: counts what jobs end without an image.
    """

    def __init__(self, max_batch: int, max_queue: int, longest_wait: float, stats: EngineStats) -> None:
        self._max_batch, self._limit = max_batch, max_batch + max_queue
        self._longest_wait, self._stats = longest_wait, stats
        self._jobs: list[Job] = []
        self._work_done = 0.0
        self._seconds_per_work = 0.0
        self._is_closed = False
        self._changed = threading.Condition()  # of the four above

    @property
    def is_closed(self) -> bool:
        """Whether no more jobs are taken."""
        return self._is_closed

    def add(self, jobs: Sequence[Job]) -> None:
        """Add jobs, all or none.

        Raises:
            UserError: there are more than would ever be taken.
            QueueFullError: there are more than are taken now.
            EngineClosedError: no more are taken.
        """
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the server is being stopped; send the request to another, or again later")
            limit, unfinished = self._limit, len(self._unfinished())
            if len(jobs) > limit:
                raise UserError(f"found {len(jobs)} images in one request; expected at most {limit}: split it")
            if unfinished + len(jobs) > limit:
                found = f"{unfinished} images are running or waiting, of {limit} that may"
                retry_after = self._seconds_until(unfinished + len(jobs) - limit)
                raise QueueFullError(f"{found}; try again in {retry_after} s", retry_after)
            for job in jobs:
                job.due = self._work_done + self._max_batch * job.work
            self._jobs += jobs
            self._changed.notify_all()

    def unfinished(self) -> list[Job]:
        """Return the jobs that wait or run."""
        with self._changed:
            return self._unfinished()

    def wait(self) -> list[Job]:
        """Wait until there are jobs, and return them; empty: the queue is closed, and none is left.

        Those that are done or withdrawn are forgotten, and those whose time is over are given up.
        """
        with self._changed:
            while not (jobs := self._remove_ended()) and not self._is_closed:
                self._changed.wait()
            return jobs

    def note(self, batch: Sequence[Job], seconds: float) -> None:
        """Note that each of some jobs has taken a step, and how long all of them took."""
        work = sum(job.work / job.request.num_inference_steps for job in batch)
        with self._changed:
            self._work_done += work
            measured = seconds / work
            self._seconds_per_work += (measured - self._seconds_per_work) * (0.1 if self._seconds_per_work else 1)

    def close(self) -> None:
        """Take no more jobs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _unfinished(self) -> list[Job]:
        return [job for job in self._jobs if not job.future.done()]

    def _remove_ended(self) -> list[Job]:
        now = time.monotonic()
        for job in self._unfinished():
            if job.expires < now:
                state = "in the queue" if job.denoising is None else f"after {job.progress:.0%} of its steps"
                if job.fail(RequestTimeoutError(f"the image was not done in time and was given up {state}")):
                    self._stats.timed_out += 1
        self._stats.cancelled += sum(job.future.cancelled() for job in self._jobs)
        self._jobs = self._unfinished()
        return list(self._jobs)

    def _seconds_until(self, places: int) -> int:
        """Estimate when so many jobs will be done."""
        left = sorted(job.work * (1 - job.progress) for job in self._jobs)
        return min(max(math.ceil(sum(left[:places]) * self._seconds_per_work), 1), math.ceil(self._longest_wait))
