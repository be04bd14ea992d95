"""What a training run shows while it goes on: a progress bar and lines in a log."""

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from atomdiff.utils.atomic import WriteError, write_text, writing
from atomdiff.utils.progress import ProgressBar

LOG_FILE = "training_log.jsonl"


class RunLog:
    """The bar, the JSON lines and the tracker of a run, fed once a step; silent but on the main process.

    Args:
        accelerator: Its trackers get every line too.
        file: The JSON lines file; lines after `step`, of a run that was stopped, are removed from it.
        step: Steps done already.
        steps: Steps in all.
        every: Steps between lines; the last step gets one in any case.
        samples: Samples in a step, on all processes.
        show: Show the bar.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        file: Path,
        step: int,
        steps: int,
        every: int,
        samples: int,
        *,
        show: bool = True,
    ) -> None:
        self._accelerator, self._file = accelerator, file
        self._steps, self._every, self._samples = steps, every, samples
        self._losses: list[float] = []
        self._spikes: list[dict[str, Any]] = []
        self._seconds = 0.0
        if accelerator.is_main_process:
            kept = [line for line in read_log(file) if line["step"] <= step] if step else []
            write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))
        show = show and accelerator.is_main_process
        self._bar = ProgressBar(total=steps, initial=step, desc="training", disable=not show)

    def note_spike(self, spike: dict[str, Any]) -> None:
        """Note a loss spike for the next line."""
        self._spikes.append(spike)

    def step(self, step: int, loss: float, average_loss: float, lr: float, seconds: float) -> None:
        """Note a finished step: its loss, what the bar shows, the adapter's learning rate, and the time it took."""
        self._losses.append(loss)
        self._seconds += seconds
        self._bar.set_postfix(loss=f"{average_loss:.4f}", refresh=False)
        self._bar.update()
        if step % self._every and step < self._steps:
            return
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "lr": lr,
            "samples_per_second": self._samples * len(self._losses) / self._seconds,
        }
        line = {"step": step, **values} | ({"loss_spikes": self._spikes} if self._spikes else {})
        self._losses, self._spikes, self._seconds = [], [], 0.0
        if self._accelerator.is_main_process:
            try:
                with writing(self._file):
                    append_line(self._file, json.dumps(line))
                    self._accelerator.log(values, step=step)
            except WriteError as error:
                warnings.warn(f"{error}. Training continues; lines are missing there", stacklevel=1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; those that are damaged are warned of and left out. No file has no lines."""
    lines, damaged = [], []
    texts = file.read_bytes().splitlines() if file.is_file() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged.append(str(number))
    if damaged:
        warnings.warn(f"{file}: skipped damaged lines: {', '.join(damaged)}", stacklevel=2)
    return lines


def append_line(file: Path, text: str) -> None:
    """Append a line, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    line = f"{text}\n".encode()
    with file.open("ab", buffering=0) as lines:
        size = lines.seek(0, os.SEEK_END)
        try:
            if lines.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            lines.truncate(size)
            raise
