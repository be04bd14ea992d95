"""Runs trials, each in a process of its own, and keeps what they gave: a finished one is not repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atomdiff.utils.atomic import write_json
from atomdiff.utils.errors import UserError
from benchmarks.trials import OF_EVALUATION, RESULT_FILE, RUN_FOLDER, TRIAL_FILE, Trial, fingerprint, has_concept

_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)


@dataclass
class Runner:
    """Runs trials, several at a time if asked to, and tells how far it is."""

    processes: int = 1
    """Trials at a time; the processor's threads are shared among them."""
    retry_failed: bool = False
    """Run trials again that have failed; what they had done is not done again."""
    need_concepts: bool = False
    """Run trials again of which only the result was kept."""
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Return the results of trials in their order; those that are not there yet are run.

        A trial is run again when something of its fingerprint has changed.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the same call goes on where it was.
        """
        with _terminated_as_interrupted(), ThreadPoolExecutor(self.processes) as pool:
            try:
                futures = [
                    pool.submit(self._run, trial, fingerprint(trial), f"{number}/{len(trials)}")
                    for number, trial in enumerate(trials, start=1)
                ]
                return [future.result() for future in futures]
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in [*self._running]:
                    process.terminate()  # training saves a checkpoint then
                raise

    def _run(self, trial: Trial, keys: dict[str, str], number: str) -> dict[str, Any]:
        if self._stopping.is_set():
            raise KeyboardInterrupt("stopped")
        folder = Path(trial.folder)
        found = read_result(folder)
        if found is not None and found["fingerprint"] == keys:
            again = self.need_concepts and not has_concept(trial) if found["status"] == "done" else self.retry_failed
            if not again:
                return found
        _prepare(trial, keys, self.processes)
        print(f"{number} {folder}", flush=True)
        result = self._start(folder)
        print(f"{number} {folder}: {describe(result)}", flush=True)
        return result

    def _start(self, folder: Path) -> dict[str, Any]:
        threads = str(max((os.cpu_count() or 1) // self.processes, 1))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if self.processes > 1 else {}
        command = [sys.executable, "-m", "benchmarks.trials", str(folder)]
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**environment, **os.environ})
            self._running.append(process)
            if self._stopping.is_set():  # since the last look
                process.terminate()
            try:
                code = process.wait()
            finally:
                self._running.remove(process)
        if code in _STOPPED or self._stopping.is_set():
            self._stopping.set()  # or the next trial would begin
            raise KeyboardInterrupt("stopped; the same command goes on")
        result = read_result(folder)
        if code == 0 and result is not None:
            return result
        ended = f"ended by signal {-code}, as for a lack of memory" if code < 0 else f"ended with status {code}"
        content = json.loads((folder / TRIAL_FILE).read_text())
        result = {"status": "failed", "message": f"{ended}: {_last_line(folder / 'log.txt')}", **content}
        write_json(folder / RESULT_FILE, result)
        return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return how the trial of a folder ended; None: it has not."""
    file = folder / RESULT_FILE
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def describe(result: dict[str, Any]) -> str:
    """Return a result in a few words."""
    if result["status"] == "failed":
        return f"failed: {result['message']}"
    metrics = next(iter(result["metrics"].values()))
    gain = metrics["similarity"]["normalized_gain"]
    gained = "no gain, as the base is as alike as the photos" if gain is None else f"gain {gain['mean']:.3f}"
    return f"{gained}, drift {metrics['drift']['mean']:.3f}, {result['train_seconds']:.0f} s of training"


def _prepare(trial: Trial, keys: dict[str, str], processes: int) -> None:
    """Write what the process reads; what an earlier trial with something else has left is removed.

    With a change of the evaluation alone, what was trained stays; with none all, the result until there is another.
    """
    folder = Path(trial.folder)
    file = folder / TRIAL_FILE
    earlier = json.loads(file.read_text())["fingerprint"] if file.is_file() else keys
    if changed := [name for name, key in keys.items() if earlier.get(name) != key]:
        print(f"{folder}: run again, with other {', '.join(changed)}", flush=True)
    if changed and set(changed) <= {*OF_EVALUATION}:
        (folder / RESULT_FILE).unlink(missing_ok=True)
        for images in folder.iterdir() if {"protocols", "sampling"} & {*changed} else ():
            if images.is_dir() and images.name != RUN_FOLDER:
                shutil.rmtree(images)
    elif changed:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter.json", trial.adapter)
    write_json(file, {"trial": asdict(trial), "fingerprint": keys, "processes": processes})


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"


def run_concepts(trials: Sequence[Trial], processes: int = 1) -> list[dict[str, Any]]:
    """Run what is missing of trials whose concepts are needed, and return the results of all, in their order.

    Raises:
        UserError: one has failed.
    """
    results = Runner(processes, need_concepts=True).run(trials)
    for trial, result in zip(trials, results, strict=True):
        if result["status"] == "failed":
            raise UserError(f"{trial.folder} failed: {result['message']}; leave out its method or subject, or mend it")
    return results


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Make a `with` block in which SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("stopped; the same command goes on")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
