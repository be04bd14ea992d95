"""Training jobs: each in a process of its own, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from atomdiff.ui.job import (
    CONFIG_FILE,
    ERRORS_FILE,
    IMAGES_FOLDER,
    OUTPUT_FILE,
    STATE_FILE,
    Job,
    State,
    running_process,
    write_state,
)
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError

TRAIN_COMMAND = (sys.executable, "-m", "atomdiff", "train")
"""What runs the training of a job."""

# A clone in the working directory, or another file there, is not to be imported (from Python 3.11 on).
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}
_INTERVAL = 0.5  # seconds between looks at what runs
_RETRY = (1.0, 300.0)  # seconds until a hand-over that failed is tried again: at first, at most


@dataclass(frozen=True)
class _Failure:
    """A hand-over that failed."""

    reason: str
    delay: float
    """Seconds from the last try to the next."""
    next_try: float
    """By `time.monotonic`."""


class JobQueue:
    """The training jobs of a folder, of which one runs at a time.

    A job is a process of its own, which goes on when this one ends. The next queue of the folder takes it up again: all
    state is on the disk.

    Args:
        folder: holds a folder for each job; made if missing.
        on_finish: called once with each job that has ended well, in the queue's thread. Where it raises an `OSError` or
            a `UserError`, it is called again later, after twice as long each time; other jobs do not wait.
        command: what runs the training; `--config FILE` follows.
    """

    def __init__(
        self, folder: Path, on_finish: Callable[[Job], None] | None = None, command: Sequence[str] = TRAIN_COMMAND
    ) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._on_finish, self._command = on_finish, command
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._failures: dict[Path, _Failure] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="atomdiff-jobs", daemon=True)

    def start(self) -> None:
        """Begin to run jobs, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Begin no more jobs; the one that runs goes on."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def jobs(self) -> list[Job]:
        """Return all jobs, the newest first."""
        created = {}
        for file in self.folder.glob(f"[!.]*/{STATE_FILE}"):  # hidden ones are being written
            job = Job(file.parent)
            try:
                created[job] = job.created
            except (OSError, ValueError, TypeError) as error:  # damaged, or of another version
                warnings.warn(f"{file}: cannot be read ({error}); this training job is left out", stacklevel=2)
        return sorted(created, key=lambda job: created[job], reverse=True)

    def job(self, name: str) -> Job:
        """Return the job of a name.

        Raises:
            UserError: there is none.
        """
        for job in self.jobs():  # a name that a browser sent is never made part of a path
            if job.name == name:
                return job
        raise UserError(f"there is no training job {name!r}; reload the page for a list of them")

    def add(
        self, name: str, images: Sequence[tuple[Path, str]], options: Mapping[str, Any], check: Callable[[Path], object]
    ) -> Job:
        """Add a job at the end of the queue.

        Args:
            name: of the concept; a number is added if there is a job of that name.
            images: image files, which are copied, and their captions; empty: none.
            options: of the run; `instance_data_dir` and `output_dir` are set here.
            check: raises `UserError` for a config file that cannot be used.

        Raises:
            UserError: as `check` does; nothing was added.
        """
        with self._lock:
            job = Job(self.folder / self._free_name(name))
            with new_folder(job.folder) as folder:
                copies = folder / IMAGES_FOLDER / job.name
                copies.mkdir(parents=True)
                for number, (file, caption) in enumerate(images, start=1):
                    copy = copies / f"{number:02d}{file.suffix.lower()}"
                    copy.write_bytes(file.read_bytes())
                    if caption.strip():
                        copy.with_suffix(".txt").write_text(f"{caption.strip()}\n", "utf-8")
                places = {"instance_data_dir": str(job.images_folder), "output_dir": str(job.run_folder)}
                text = yaml.safe_dump({**options, **places}, sort_keys=False, allow_unicode=True)
                (folder / CONFIG_FILE).write_text(text, "utf-8")
                check(folder / CONFIG_FILE)
                now = time.time()
                (folder / STATE_FILE).write_text(json.dumps(asdict(State(created=now, queued=now))), "utf-8")
        return job

    def ask(self, job: Job, request: str) -> None:
        """Ask the process of a job for something after its next step.

        Args:
            job: the job.
            request: `GENERATE_FILE` or `SAVE_FILE` of `atomdiff.training.intermediate`.

        Raises:
            UserError: it is not running.
        """
        if (status := job.status) != "running":
            raise UserError(f"the training of {job.name!r} is {status}; only one that runs can be asked for something")
        job.run_folder.mkdir(exist_ok=True)
        (job.run_folder / request).touch()

    def hand_over_error(self, job: Job) -> str:
        """Return why the last try to hand over a finished job failed; empty: none did."""
        failure = self._failures.get(job.folder)
        return "" if failure is None else failure.reason

    def stop(self, job: Job) -> None:
        """Take a job out of the queue, or ask its process to save a checkpoint and to stop."""
        with self._lock:
            state = job.state
            if state.queued is not None:
                write_state(job, replace(state, queued=None))
            elif (process := running_process(state)) is not None and not state.stop_requested:
                write_state(job, replace(state, stop_requested=True))
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))

    def resume(self, job: Job) -> None:
        """Put a job that was stopped or failed at the end of the queue; it goes on from its newest checkpoint.

        Raises:
            UserError: it runs, waits or is finished.
        """
        with self._lock:
            if (status := job.status) not in ("stopped", "failed"):
                raise UserError(f"the training of {job.name!r} is {status}; only one that was stopped can be resumed")
            write_state(job, replace(job.state, queued=time.time(), resume=True))

    def _free_name(self, name: str) -> str:
        number, free = 1, name
        while (self.folder / free).exists():
            number += 1
            free = f"{name}-{number}"
        return free

    def _work(self) -> None:
        while not self._closed.wait(_INTERVAL):
            try:
                self._look()
            except (OSError, ValueError) as error:  # somebody removes folders, or the disk is full
                warnings.warn(f"{self.folder}: {error}; the training jobs there are looked at again", stacklevel=1)

    def _look(self) -> None:
        """Begin the next job if none runs, and hand over those that have finished."""
        for child in self._children.values():
            child.poll()  # or it would stay as a zombie
        with self._lock:
            jobs = self.jobs()
            statuses = {job: job.status for job in jobs}
            if not {"running", "stopping"} & set(statuses.values()):
                waiting = [job for job, status in statuses.items() if status == "queued"]
                if waiting:
                    self._begin(min(waiting, key=lambda job: job.state.queued or 0))
        for job, status in statuses.items():
            if status == "finished" and not job.state.handed_over:
                self._hand_over(job)

    def _hand_over(self, job: Job) -> None:
        failure, now = self._failures.get(job.folder), time.monotonic()
        if failure is not None and now < failure.next_try:
            return
        try:
            if self._on_finish is not None:
                self._on_finish(job)
            write_state(job, replace(job.state, handed_over=True))
        except (OSError, UserError) as error:
            delay = _RETRY[0] if failure is None else min(2 * failure.delay, _RETRY[1])
            self._failures[job.folder] = _Failure(str(error), delay, now + delay)
        else:
            self._failures.pop(job.folder, None)

    def _begin(self, job: Job) -> None:
        state = job.state
        command = [*self._command, "--config", str(job.config_file)]
        if state.resume:
            command += ["--resume_from_checkpoint", "latest"]
        with open(job.folder / OUTPUT_FILE, "wb") as output, open(job.folder / ERRORS_FILE, "wb") as errors:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,  # a Ctrl-C is for the server alone
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
            )
        self._children[job.folder] = child
        started = psutil.Process(child.pid).create_time()
        write_state(job, replace(state, queued=None, process=child.pid, process_started=started, stop_requested=False))
