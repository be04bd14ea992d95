"""What a training run has logged so far: steps, losses, images, time left, and its report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.training import measurements, run_log
from atomdiff.training.contact_sheet import list_row_files
from atomdiff.training.report.write import RECORD_FILE
from atomdiff.training.run_log import read_log

_RECENT = 5  # lines of the log whose speed counts


@dataclass(frozen=True)
class RunProgress:
    """How far a run is."""

    step: int
    """Steps done, as of the last line of its log."""
    log: Sequence[Mapping[str, Any]]
    """Lines with `step`, `loss` and `samples_per_second`."""
    measurements: Sequence[Mapping[str, Any]]
    """Lines with `step`, `validation_loss`, `training_images_loss` and `base_drift`, as far as they were measured."""
    images: Sequence[tuple[int, Path]]
    """Step and file of the validation images, in the order of time."""
    report: Mapping[str, Any] | None
    """The report of a finished run, with findings; None: there is none yet, or it is damaged."""


def read_progress(folder: Path) -> RunProgress:
    """Read what a run has written to its `output_dir` so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a line that is being written
        log, measured = (read_log(folder / file) for file in (run_log.LOG_FILE, measurements.LOG_FILE))
    try:
        report = json.loads((folder / RECORD_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        report = None
    if not (isinstance(report, dict) and "findings" in report):
        report = None
    step = log[-1]["step"] if log else 0
    return RunProgress(step, log, measured, list_row_files(folder), report)


def seconds_left(progress: RunProgress, steps: int, samples_per_step: int) -> float | None:
    """Estimate how long a run will train yet, from the speed of the last lines of its log; None: it has none.

    Args:
        progress: of the run.
        steps: in all.
        samples_per_step: instance and class images of a step.
    """
    speeds = [line["samples_per_second"] for line in progress.log[-_RECENT:]]
    if not speeds or not all(speed > 0 for speed in speeds):
        return None
    seconds_per_step = samples_per_step * sum(1 / speed for speed in speeds) / len(speeds)
    return (steps - progress.step) * seconds_per_step
