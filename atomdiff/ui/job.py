"""A training job: a run in a folder of its own, and all that is known of it, on the disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from atomdiff.training.config import TrainConfig
from atomdiff.training.intermediate import list_saved_steps
from atomdiff.utils.atomic import write_json

CONFIG_FILE = "train.yaml"
"""The options of a job's run, as `atomdiff train --config` takes them."""

STATE_FILE, OUTPUT_FILE, ERRORS_FILE = "job.json", "stdout.txt", "stderr.txt"
RUN_FOLDER, IMAGES_FOLDER = "run", "images"
_SAME_START = 2.0  # seconds that two readings of a process's start may differ

Status = Literal["queued", "running", "stopping", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class State:
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
        return self.folder / IMAGES_FOLDER / self.name

    @property
    def run_folder(self) -> Path:
        """The run's `output_dir`."""
        return self.folder / RUN_FOLDER

    @property
    def created(self) -> float:
        """When it was added, in seconds since 1970."""
        return self.state.created

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options in its config file; none where it cannot be read, which its run says, too."""
        try:
            options = yaml.safe_load(self.config_file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return options if isinstance(options, dict) else {}

    @property
    def state(self) -> State:
        """What is on the disk."""
        return State(**json.loads((self.folder / STATE_FILE).read_text("utf-8")))

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
        if running_process(state) is not None:
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
        for line in reversed(_lines(self.folder / OUTPUT_FILE)):
            if line.startswith("saved "):
                return Path(line.removeprefix("saved "))
        return None

    @property
    def saved_steps(self) -> dict[int, Path]:
        """The concept files of steps that it has saved on the way, and that of its end, in order."""
        saved = {step: path for step, path in list_saved_steps(self.run_folder) if path.is_file()}
        if (result := self.result) is not None and result.is_file():
            saved[int(self.options.get("max_train_steps", TrainConfig.max_train_steps))] = result
        return saved

    @property
    def last_line(self) -> str:
        """What the process said last: the phase of the run, a warning, or an error."""
        lines = [line for line in _lines(self.folder / ERRORS_FILE) if line.strip()]
        return lines[-1].strip() if lines else ""


def write_state(job: Job, state: State) -> None:
    """Write what `Job.state` reads.

    Raises:
        WriteError: it cannot be written.
    """
    write_json(job.folder / STATE_FILE, asdict(state))


def running_process(state: State) -> psutil.Process | None:
    """Return the process of a job, if it has not ended."""
    if state.process is None:
        return None
    try:
        process = psutil.Process(state.process)
        is_same = abs(process.create_time() - state.process_started) < _SAME_START
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # the number is that of somebody else's process by now
        return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
