"""Training jobs: each in a process of its own, one after the other, and all that is known of them on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from atomdiff.utils.atomic import new_folder, write_json
from atomdiff.utils.errors import UserError

CONFIG_FILE = "train.yaml"
"""The options of a job's run, as `atomdiff train --config` takes them."""
TRAIN_COMMAND = (sys.executable, "-m", "atomdiff", "train")

_STATE_FILE, _OUTPUT_FILE, _ERRORS_FILE = "job.json", "stdout.txt", "stderr.txt"
_RUN_FOLDER, _IMAGES_FOLDER = "run", "images"
_INTERVAL = 0.5  # seconds between looks at what runs
_SAME_START = 2.0  # seconds that two readings of a process's start may differ

Status = Literal["queued", "running", "stopping", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class _State:
    """What `job.json` holds."""

    created: float
    """Seconds since 1970."""
    queued: float | None
    """Since when the job waits, in seconds since 1970; None: it does not."""
    resume: bool = False
    """Whether it goes on from its newest checkpoint."""
    process: int | None = None
    """Number of the process that it has run in; None: it has not run."""
    process_started: float = 0.0
    """When that process began, in seconds since 1970: numbers are used again."""
    stop_requested: bool = False
    """Whether that process was asked to stop."""
    handed_over: bool = False
    """Whether the finished job was handed over to whoever waits for results."""


@dataclass(frozen=True)
class Job:
    """A training run in a folder of its own: options, images, state, and what the run writes."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the job, and of the concept."""
        return self.folder.name

    @property
    def config_file(self) -> Path:
        """The YAML file of the run's options."""
        return self.folder / CONFIG_FILE

    @property
    def images_folder(self) -> Path:
        """The folder of the instance images, which has the concept's name."""
        return self.folder / _IMAGES_FOLDER / self.name

    @property
    def run_folder(self) -> Path:
        """The run's `output_dir`."""
        return self.folder / _RUN_FOLDER

    @property
    def created(self) -> float:
        """When it was added, in seconds since 1970."""
        return self.state.created

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options in its config file."""
        return dict(yaml.safe_load(self.config_file.read_text("utf-8")))

    @property
    def state(self) -> _State:
        """What is on the disk."""
        return _State(**json.loads((self.folder / _STATE_FILE).read_text("utf-8")))

    @property
    def status(self) -> Status:
        """What the job does now, or how it ended."""
        return self.outcome[0]

    @property
    def outcome(self) -> tuple[Status, str]:
        """The status, and for a job that is not finished what its process said last."""
        state = self.state
        if state.queued is not None:
            return "queued", ""
        if state.process is None:
            return "stopped", ""
        said = self.last_line
        if _is_alive(state):
            return ("stopping" if state.stop_requested else "running"), said
        if self.result is not None:
            return "finished", ""
        if state.stop_requested or said.startswith("stopped"):
            return "stopped", said if said.startswith("stopped") else ""
        _, is_error, reason = said.partition(" error: ")
        lost = "the process ended without a word, as when it is killed or memory runs out: resume it"
        return "failed", reason if is_error else lost

    @property
    def result(self) -> Path | None:
        """The concept's file, or the folder of another method; None: the run has not ended well."""
        for line in reversed(_lines(self.folder / _OUTPUT_FILE)):
            if line.startswith("saved "):
                return Path(line.removeprefix("saved "))
        return None

    @property
    def last_line(self) -> str:
        """What the process said last: the phase of the run, a warning, or an error."""
        lines = [line for line in _lines(self.folder / _ERRORS_FILE) if line.strip()]
        return lines[-1].strip() if lines else ""


class JobQueue:
    """The training jobs of a folder, of which one runs at a time.

    A job is a process of its own, which goes on when this one ends. The next queue of the folder takes it up again: all
    state is on the disk.

    Args:
        folder: holds a folder for each job; made if missing.
        on_finish: called once with each job that has ended well, in the queue's thread.
        command: what runs the training; `--config FILE` follows.
    """

    def __init__(
        self, folder: Path, on_finish: Callable[[Job], None] | None = None, command: Sequence[str] = TRAIN_COMMAND
    ) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._on_finish, self._command = on_finish, command
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
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
        jobs = [Job(file.parent) for file in self.folder.glob(f"*/{_STATE_FILE}")]
        return sorted(jobs, key=lambda job: job.created, reverse=True)

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
                copies = folder / _IMAGES_FOLDER / job.name
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
                (folder / _STATE_FILE).write_text(json.dumps(asdict(_State(created=now, queued=now))), "utf-8")
        return job

    def stop(self, job: Job) -> None:
        """Take a job out of the queue, or ask its process to save a checkpoint and to stop."""
        with self._lock:
            state = job.state
            if state.queued is not None:
                _write(job, replace(state, queued=None))
            elif (process := _process(state)) is not None and not state.stop_requested:
                _write(job, replace(state, stop_requested=True))
                with suppress(psutil.NoSuchProcess):
                    process.terminate()

    def resume(self, job: Job) -> None:
        """Put a job that was stopped or failed at the end of the queue; it goes on from its newest checkpoint.

        Raises:
            UserError: it runs, waits or is finished.
        """
        with self._lock:
            if (status := job.status) not in ("stopped", "failed"):
                raise UserError(f"the training of {job.name!r} is {status}; only one that was stopped can be resumed")
            _write(job, replace(job.state, queued=time.time(), resume=True))

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
            if status == "finished" and not (state := job.state).handed_over:
                if self._on_finish is not None:
                    self._on_finish(job)
                _write(job, replace(state, handed_over=True))

    def _begin(self, job: Job) -> None:
        state = job.state
        command = [*self._command, "--config", str(job.config_file)]
        if state.resume:
            command += ["--resume_from_checkpoint", "latest"]
        with open(job.folder / _OUTPUT_FILE, "wb") as output, open(job.folder / _ERRORS_FILE, "wb") as errors:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
                start_new_session=True,  # a Ctrl-C is for the server alone
            )
        self._children[job.folder] = child
        started = psutil.Process(child.pid).create_time()
        _write(job, replace(state, queued=None, process=child.pid, process_started=started, stop_requested=False))


def _write(job: Job, state: _State) -> None:
    write_json(job.folder / _STATE_FILE, asdict(state))


def _process(state: _State) -> psutil.Process | None:
    """Return the process of a job, if it has not ended."""
    try:
        process = psutil.Process(state.process)
        is_same = abs(process.create_time() - state.process_started) < _SAME_START
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _is_alive(state: _State) -> bool:
    return state.process is not None and _process(state) is not None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
