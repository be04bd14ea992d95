"""Workers on a Ray cluster, each an actor with a GPU, or without GPUs with a CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from atomdiff.training.config import TrainConfig
from atomdiff.training.fleet.queue import Event
from atomdiff.training.fleet.workers import SubjectTrainer
from atomdiff.utils.errors import UserError


class RayPool:
    """Workers on a Ray cluster.

    Actors end with the driver. Ray keeps what they print, and does not restart them: the queue does.

    Args:
        runs: The training run of each subject, by its name.
        num_workers: How many workers there are. None: one for each GPU, or else for each CPU.
        address: As `ray.init` takes it.

    Raises:
        UserError: There is no such cluster.
    """

    def __init__(self, runs: Mapping[str, TrainConfig], num_workers: int | None, address: str) -> None:
        self._runs = runs
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"ray_address={address!r}: no cluster can be reached there ({reason})") from error
        resources = ray.cluster_resources()
        unit = "GPU" if resources.get("GPU") else "CPU"
        self.num_workers = min(num_workers or int(resources[unit]), len(runs))
        self._actor = ray.remote(num_cpus=1, num_gpus=int(unit == "GPU"))(RayTrainer)
        self._workers: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}

    def start(self, worker: int) -> None:
        """Start an actor."""
        run = next(iter(self._runs.values()))
        actor = self._workers[worker] = self._actor.remote(run, worker, os.getcwd())
        self._pending[actor.ready.remote()] = worker

    def assign(self, worker: int, name: str) -> None:
        """Send a run to an actor."""
        self._pending[self._workers[worker].train.remote(self._runs[name])] = worker

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what an actor gives, or that it is lost."""
        done, _ = ray.wait([*self._pending], timeout=seconds)
        return [self._receive(reference) for reference in done]

    def _receive(self, reference: Any) -> Event:
        worker = self._pending.pop(reference)
        try:
            event: Event = ray.get(reference)
            return event
        except ray.exceptions.RayError as error:
            del self._workers[worker]
            return Event(worker, "lost", reason=f"worker {worker} was lost: {' '.join(str(error).split())}")

    def kill(self, worker: int) -> None:
        """Kill an actor."""
        self._pending = {reference: other for reference, other in self._pending.items() if other != worker}
        ray.kill(self._workers.pop(worker))

    def close(self) -> None:
        """End the actors, and leave the cluster."""
        for actor in self._workers.values():
            ray.kill(actor)
        ray.shutdown()


class RayTrainer(SubjectTrainer):
    """A worker that is an actor; paths that are not absolute begin where the driver has been started."""

    def __init__(self, run: TrainConfig, worker: int, folder: str) -> None:
        os.chdir(folder)
        super().__init__(run, worker)
