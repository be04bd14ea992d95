"""A training run that something happens to: what a child process of `benchmarks.survival` does.

What happens is tied to a moment: before a certain file operation (or connection) of a certain phase of the run. Python
tells of these operations through audit hooks, so that nothing of atomdiff is patched.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atomdiff.training import dreambooth
from atomdiff.training.report import write  # noqa: F401  # matplotlib, which is loaded late otherwise
from atomdiff.utils.errors import UserError

CACHING = "caching"
CLASS_IMAGES = "generating class images"
VALIDATING = "validating"
LOGGING = "logging a step"
CHECKPOINT = "writing a checkpoint"
ROTATING = "rotating checkpoints"
SAVING = "saving the concept"
PUSHING = "pushing"
ANY = "any time"
"""Not a phase: a share of the run's time."""

# The innermost of these functions that is running says what the phase is.
_PHASES = {
    ("atomdiff.utils.tensor_cache", "_write"): CACHING,
    ("atomdiff.training.class_images", "ensure_class_images"): CLASS_IMAGES,
    ("atomdiff.training.validation", "validate"): VALIDATING,
    ("atomdiff.training.run_log", "step"): LOGGING,
    ("atomdiff.training.checkpoint", "save_checkpoint"): CHECKPOINT,
    ("atomdiff.utils.atomic", "remove_folder"): ROTATING,
    ("atomdiff.training.saving", "save_result"): SAVING,
    ("atomdiff.training.push", "push_concept"): PUSHING,
}
_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "socket.connect")
_NOBODY = 65534

tqdm.set_lock(threading.RLock())  # its own, for several processes, would be left behind by a kill


@dataclass(frozen=True)
class Moment:
    """When something happens to a run, and what."""

    phase: str
    operation: float
    """The number of the phase's file operation before which it happens, from 0; with `ANY` seconds of the run."""
    action: Callable[[], object]
    delay: float = 0.0
    """Seconds after that, so that it may be in the middle of what Python does not tell of, such as writing."""


@dataclass(frozen=True)
class Plan:
    """A run, and what happens to it."""

    fields: dict[str, Any]
    """Of `TrainConfig`."""
    finished: str
    """File to which the steps of finished checkpoints are appended."""
    moments: Sequence[Moment] = ()
    log: str = os.devnull
    """File for what the run prints."""
    as_nobody: bool = False
    """Whether it runs without root's rights, as far as it has them."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, `error` (a UserError), `stopped`, `bug` (any other exception) or `killed`."""

    status: str
    message: str = ""
    warnings: tuple[str, ...] = ()
    operations: dict[str, int] = field(default_factory=dict)
    """File operations by phase."""


def kill() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Ask this process to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


class Watch:
    """Counts the file operations of this process by phase, and lets happen what a plan says."""

    def __init__(self, plan: Plan) -> None:
        self.operations: Counter[str] = Counter()
        self._left = [moment for moment in plan.moments if moment.phase != ANY]
        self._finished = os.open(plan.finished, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._renamed = ""
        self._busy = False
        self._thread = threading.get_ident()
        for moment in plan.moments:
            if moment.phase == ANY:
                _after(moment.operation, moment.action)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or threading.get_ident() != self._thread:
            return
        if self._renamed:  # that is over, or has failed, once something else happens
            if os.path.isdir(self._renamed):
                os.write(self._finished, f"{self._renamed.rpartition('-')[2]}\n".encode())
            self._renamed = ""
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in _OPERATIONS:
            return
        self._busy = True
        try:
            self._count()
        finally:
            self._busy = False
        if event == "os.rename" and re.fullmatch(r"checkpoint-\d+", Path(arguments[1]).name):
            self._renamed = os.fspath(arguments[1])

    def _count(self) -> None:
        phase = _phase()
        if phase is None:
            return
        number = self.operations[phase]
        self.operations[phase] += 1
        for moment in [each for each in self._left if (each.phase, each.operation) == (phase, number)]:
            self._left.remove(moment)
            if moment.delay:
                _after(moment.delay, moment.action)
            else:
                moment.action()


def _phase() -> str | None:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if found := _PHASES.get((frame.f_globals.get("__name__"), frame.f_code.co_name)):
            return found
        frame = frame.f_back
    return None


def _after(seconds: float, action: Callable[[], object]) -> None:
    def wait() -> None:
        time.sleep(seconds)
        action()

    threading.Thread(target=wait, daemon=True).start()


def run(plan: Plan, connection: Any) -> None:
    """Train as a plan says, and send the `Outcome`, unless the process is killed before."""
    output = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.dont_write_bytecode = True
    watch = Watch(plan)
    if plan.as_nobody and os.geteuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    status, message = "done", ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            dreambooth.train(dreambooth.TrainConfig(**plan.fields))
        except UserError as error:
            status, message = "error", str(error)
        except KeyboardInterrupt as stop:
            status, message = "stopped", str(stop)
        except Exception as error:
            status, message = "bug", f"{type(error).__name__}: {error}"
    told = tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning))
    connection.send(Outcome(status, message, told, dict(watch.operations)))
