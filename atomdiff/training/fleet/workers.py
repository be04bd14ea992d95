"""Workers: each keeps the base loaded and trains subject after subject; those of this machine are processes."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe, connection, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from atomdiff.training.base_model import load_base
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.fleet.queue import Event
from atomdiff.training.fleet.signs import giving_signs
from atomdiff.training.processes import start_worker
from atomdiff.utils.errors import UserError
from atomdiff.utils.quiet import quiet_libraries

_END_SECONDS = 300.0  # that workers have for their last step and a checkpoint, once they are to end


class SubjectTrainer:
    """A worker: it loads the base that all subjects share, and trains one after another on copies of it.

    Args:
        run: Of any of the subjects.
        worker: Its number.

    Raises:
        UserError: The base cannot be loaded.
    """

    def __init__(self, run: TrainConfig, worker: int) -> None:
        quiet_libraries()
        self.worker, self._base = worker, load_base(run)

    def ready(self) -> Event:
        """Return that the base is loaded."""
        return Event(self.worker, "ready")

    def train(self, run: TrainConfig) -> Event:
        """Train a subject as `atomdiff train` does, and return what came of it; errors are kept in it.

        Raises:
            KeyboardInterrupt: It was asked to stop, and has saved a checkpoint.
        """
        started = time.perf_counter()
        error = ""
        try:
            with giving_signs(Path(run.output_dir)):
                train(run, base=self._base)
        except UserError as problem:
            error = str(problem)
        except Exception as problem:
            traceback.print_exc()
            error = " ".join(f"{type(problem).__name__}: {problem}".split())
        gc.collect()  # of the run, whose parts know each other
        return Event(self.worker, "failed" if error else "done", time.perf_counter() - started, error)


class ProcessPool:
    """Workers that are processes of this machine.

    A worker ends with the process that started it, however that ends.

    Args:
        runs: The training run of each subject, by its name.
        num_workers: How many workers there are.
        logs: Folder of a text file for each worker, with all that it prints.
    """

    def __init__(self, runs: Mapping[str, TrainConfig], num_workers: int, logs: Path) -> None:
        self._runs, self._num_workers, self._logs = runs, num_workers, logs
        self._workers: dict[int, tuple[BaseProcess, connection.Connection]] = {}
        self._idle: set[int] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, worker: int) -> None:
        """Start a process."""
        ours, theirs = Pipe()
        log_file = self._logs / f"worker-{worker}.txt"
        args = (theirs, next(iter(self._runs.values())), worker, log_file)
        self._workers[worker] = start_worker(_serve, args, worker, self._num_workers), ours
        theirs.close()

    def assign(self, worker: int, name: str) -> None:
        """Send a run to a process."""
        self._idle.discard(worker)
        with suppress(OSError):  # it is lost: `wait` will tell
            self._workers[worker][1].send(self._runs[name])

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what the processes have sent, and which of them have ended."""
        numbers = {ours: worker for worker, (_, ours) in self._workers.items()}
        return [self._receive(numbers[ours]) for ours in connection.wait([*numbers], seconds)]  # type: ignore[index]

    def _receive(self, worker: int) -> Event:
        process, ours = self._workers[worker]
        event: Event | None = None
        with suppress(EOFError, OSError):
            event = ours.recv()
            if event.kind != "lost":
                self._idle.add(worker)
                return event
        process.join()
        self._forget(worker)
        if event is not None:
            return event
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        log_file = self._logs / f"worker-{worker}.txt"
        return Event(worker, "lost", reason=f"worker {worker} {how}; {log_file} has what it said")

    def kill(self, worker: int) -> None:
        """Kill a process; one that waits for a device or a file system may end later."""
        self._workers[worker][0].kill()
        self._forget(worker)

    def _forget(self, worker: int) -> None:
        self._workers.pop(worker)[1].close()
        self._idle.discard(worker)

    def close(self) -> None:
        """End the processes: those that train save a checkpoint, and those that hang are killed after a while."""
        for worker, (process, ours) in self._workers.items():
            if worker in self._idle:
                ours.close()  # nothing can come any more
            else:
                process.terminate()
        end = time.monotonic() + _END_SECONDS
        for process, _ in self._workers.values():
            process.join(max(end - time.monotonic(), 0))
            process.kill()
        self._workers.clear()


def _serve(theirs: connection.Connection, run: TrainConfig, worker: int, log_file: Path) -> None:
    """Be a worker process: train what comes, until nothing can come any more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log_file, "a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        trainer = SubjectTrainer(run, worker)
        theirs.send(trainer.ready())
        while True:
            theirs.send(trainer.train(theirs.recv()))
    except (EOFError, BrokenPipeError):
        pass
    except KeyboardInterrupt as stop:
        print(stop)
        sys.exit(130)
    except UserError as error:
        theirs.send(Event(worker, "lost", reason=str(error)))


def _end_with_parent() -> None:
    """End this process once the one that started it has ended: nobody could tell it what to train."""
    parent = parent_process()
    assert parent is not None  # for `mypy`
    connection.wait([parent.sentinel])
    os._exit(1)
