"""A fleet: the subjects of a table, trained by workers that each keep the base loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.fleet import FleetConfig
from atomdiff.training.fleet.progress import Progress
from atomdiff.training.fleet.queue import Event, Queue, WorkerPool
from atomdiff.training.fleet.report import FleetReport, fill_library, write_report
from atomdiff.training.fleet.signs import Watch, last_sign
from atomdiff.training.fleet.state import SubjectState, Try, read_states
from atomdiff.training.fleet.table import read_subjects
from atomdiff.training.fleet.workers import ProcessPool
from atomdiff.training.launch import check_package, check_packages
from atomdiff.training.processes import choose_num_workers
from atomdiff.training.signals import StopSignals
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import NeedsPackage, marked_fields
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log

LOGS_FOLDER = "logs"


def train_fleet(config: FleetConfig, run: Mapping[str, Any]) -> FleetReport:
    """Train the subjects of a table that are not done; write their concepts, the library and the report.

    On a CPU each subject's concept has the same bytes as that of `atomdiff train` with as many threads, whatever
    workers were lost and whatever was tried again on the way.

    Args:
        config: Of the fleet.
        run: Values of `TrainConfig` that all subjects share, by field.

    Returns:
        What has become of the subjects.

    Raises:
        UserError: Table, options or folders do not fit, no worker can be started, or another call has the folder.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the report was written; the same command goes on.
    """
    started = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("found several processes of a launcher; atomdiff fleet starts its workers itself: run it alone")
    if config.ray_address is not None:
        needed = marked_fields(FleetConfig, NeedsPackage)["ray_address"]
        check_package(f"ray_address={config.ray_address!r}", needed)
    subjects = read_subjects(config, run)
    for subject in subjects:
        check_packages(subject.run)
    folder = Path(config.output_dir)
    with lock_folder(folder):
        states = read_states(subjects)
        runs = {name: state.run for name, state in states.items() if state.status != "done"}
        if done := len(states) - len(runs):
            log(f"going on in {folder}; subjects done: {done}, to train: {len(runs)}")
        num_workers, stopped = 0, False
        try:
            if runs:
                num_workers, stopped = _train(config, states, runs)
        finally:  # also where no worker is left
            fill_library(folder, states)
            report = write_report(folder, states, time.monotonic() - started, num_workers)
    if stopped:
        raise KeyboardInterrupt(f"stopped; {report.describe()}\nthe same command goes on")
    return report


def _train(
    config: FleetConfig, states: Mapping[str, SubjectState], runs: Mapping[str, TrainConfig]
) -> tuple[int, bool]:
    """Train subjects; return the number of workers, and whether it was stopped."""
    with StopSignals() as stop:
        pool, num_workers = _open_pool(config, runs)
        with closing(pool), Progress(len(states), len(states) - len(runs), num_workers) as progress:
            watch = Watch(lambda name: last_sign(states[name].folder), config.worker_timeout)
            queue = Queue([*runs], pool, num_workers, config.max_tries, Ledger(states, progress), watch)
            try:
                queue.run(lambda: stop.requested)
            finally:
                for name in queue.running:
                    states[name].status = "waiting"
    return num_workers, stop.requested


def _open_pool(config: FleetConfig, runs: Mapping[str, TrainConfig]) -> tuple[WorkerPool, int]:
    """Return the workers, none of which is started, and how many there are."""
    if config.ray_address is not None:
        from atomdiff.training.fleet.ray_pool import RayPool

        ray_pool = RayPool(runs, config.num_workers, config.ray_address)
        return ray_pool, ray_pool.num_workers
    num_workers = min(choose_num_workers(config.num_workers), len(runs))
    return ProcessPool(runs, num_workers, Path(config.output_dir) / LOGS_FOLDER), num_workers


class Ledger:
    """Notes on disk what becomes of each subject, and shows it."""

    def __init__(self, states: Mapping[str, SubjectState], progress: Progress) -> None:
        self._states, self._progress = states, progress

    def started(self, name: str, worker: int) -> None:
        """Note that a worker begins with a subject."""
        state = self._states[name]
        state.status = "running"
        state.write()
        self._progress.started(name, worker)

    def ended(self, name: str, event: Event, again: bool) -> None:
        """Note how a try has ended."""
        state = self._states[name]
        done = event.kind == "done"
        state.tries.append(Try(event.worker, round(event.seconds, 2), None if done else event.reason))
        state.status = "done" if done else "waiting" if again else "failed"
        state.write()
        self._progress.ended(name, event, again)
