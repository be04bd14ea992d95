"""What a training run shows while it goes on: a bar, log lines, a contact sheet; and how it is asked to stop."""

import errno
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate import Accelerator
from PIL import Image

from atomdiff.utils.atomic import WriteError, write_png, write_text, writing
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.progress import ProgressBar

_SAME = 1.0  # second
_STEP = re.compile(r"step-(\d+)-\d+\.png")


class RunLog:
    """The bar, the JSON lines and the tracker of a run, fed once a step; silent but on the main process.

    Args:
        accelerator: Its trackers get every line too.
        file: The JSON lines file; lines after `step`, of a run that was stopped, are removed from it.
        step: Steps done already.
        steps: Steps in all.
        every: Steps between lines; the last step gets one in any case.
        samples: Samples in a step, on all processes.
    """

    def __init__(self, accelerator: Accelerator, file: Path, step: int, steps: int, every: int, samples: int) -> None:
        self._accelerator, self._file = accelerator, file
        self._steps, self._every, self._samples = steps, every, samples
        self._losses: list[float] = []
        self._seconds = 0.0
        if accelerator.is_main_process:
            kept = [line for line in read_log(file) if line["step"] <= step] if step else []
            write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._bar = ProgressBar(total=steps, initial=step, desc="training", disable=not accelerator.is_main_process)

    def step(self, step: int, loss: float, average_loss: float, lr: float, seconds: float) -> None:
        """Note a finished step.

        Args:
            step: Its number, from 1.
            loss: Its loss.
            average_loss: What the bar shows.
            lr: The adapter's learning rate.
            seconds: Time it took.
        """
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
        self._losses, self._seconds = [], 0.0
        if self._accelerator.is_main_process:
            try:
                with writing(self._file):
                    _append(self._file, json.dumps({"step": step, **values}) + "\n")
                    self._accelerator.log(values, step=step)
            except WriteError as error:
                warnings.warn(f"{error}. The training goes on; lines are missing there", stacklevel=1)

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
        warnings.warn(f"{file}: left out what cannot be read, line {', '.join(damaged)}", stacklevel=2)
    return lines


def _append(file: Path, text: str) -> None:
    """Append a line, whole or not at all."""
    with file.open("ab", buffering=0) as lines:
        size = lines.seek(0, os.SEEK_END)
        try:
            if lines.write(text.encode()) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            lines.truncate(size)
            raise


def extend_contact_sheet(output_dir: Path, step: int, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Add a row to `contact_sheet.png`, one picture a prompt; the pictures themselves go to `validation/`.

    Rows of this step and of later ones, left by a run that was stopped or by an earlier one, are replaced. Earlier rows
    may have more or fewer pictures, of other prompts; the place of one that cannot be read stays empty.
    """
    folder = output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    drop_rows(output_dir, step)
    rows: dict[int, list[Image.Image | None]] = {}
    for number, file in _row_files(output_dir):
        rows.setdefault(number, []).append(_read(file))
    rows[step] = list(pictures)
    unknown = [""] * (max(map(len, rows.values())) - len(prompts))
    sheet = make_image_grid(list(rows.values()), [f"step {number}" for number in rows], [*prompts, *unknown])
    write_png(output_dir / "contact_sheet.png", sheet)
    for column, picture in enumerate(pictures):  # after the sheet, so that who finds all of them has the row
        write_png(folder / f"step-{step:06d}-{column:02d}.png", picture)


def drop_rows(output_dir: Path, step: int) -> None:
    """Remove the pictures of the rows of a step and of later ones."""
    for number, file in _row_files(output_dir):
        if number >= step:
            file.unlink()


def _row_files(output_dir: Path) -> list[tuple[int, Path]]:
    """List the pictures of the contact sheet with their steps, in order."""
    files = [(_STEP.fullmatch(file.name), file) for file in sorted((output_dir / "validation").glob("step-*.png"))]
    return [(int(found[1]), file) for found, file in files if found and file.is_file()]


def _read(file: Path) -> Image.Image | None:
    """Return a picture and close its file; None, with a warning, if it cannot be read."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        warnings.warn(f"{file}: cannot be read ({error}); its place in the contact sheet stays empty", stacklevel=1)
        return None


class StopSignals:
    """A `with` block in which the first Ctrl-C or SIGTERM only sets `requested`; a later one acts as usual.

    Launchers of several processes pass a Ctrl-C on to those who have heard it themselves: what comes within a second of
    the first is the same one.

    Raises:
        KeyboardInterrupt: At the block's end, in place of an error that it ends with once asked to stop. Such an error
            may be the end of another process, which the signal was to follow.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self.requested and isinstance(error, Exception):
            raise KeyboardInterrupt(f"stopped; {type(error).__name__}: {error}") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() > self._since + _SAME:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
