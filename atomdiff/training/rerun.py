"""Repeating a recorded run, and comparing what comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.rerun import RerunConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.run_comparison import RunComparison, compare_runs
from atomdiff.training.run_record import RunRecord, read_record, recorded_config
from atomdiff.utils.atomic import write_json
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import refuse_overlap
from atomdiff.utils.precision import choose_precision, compute_device

COMPARISON_FILE = "rerun.json"


def repeat_run(config: RerunConfig) -> RunComparison:
    """Repeat a run, write `rerun.json` into the folder of the repetition, and return what differs.

    On a CPU, the same settings, data and versions give the same bytes; the precision is that of the run, whatever this
    machine would choose. A run of several processes is repeated by one with as many batches a step. Nothing is pushed.

    Raises:
        UserError: There is no record of a finished run, images or base are gone or have changed, or as `train`.
    """
    folder = Path(config.folder).resolve()
    record = read_record(folder)
    if record.result is None:
        raise UserError(f"{folder}: this run has not ended; resume it with --resume_from_checkpoint latest first")
    output = Path(config.output_dir or f"{folder}-rerun").resolve()
    refuse_overlap({"output_dir": output}, {"the run that is repeated": folder}, inside=False)
    named = {name: getattr(config, name) for name in ("instance_data_dir", "pretrained_model_name_or_path")}
    moved = {name: os.path.abspath(path) if os.path.exists(path) else path for name, path in named.items() if path}
    with _working_directory(record.working_directory):
        run = _repeated(record, folder, output, moved)
        for subject in run.subjects:
            if not Path(subject.instance_data_dir).is_dir():
                expected = "expected the images of that run: put them back, or name their folder with instance_data_dir"
                raise UserError(f"{folder}: found no folder {subject.instance_data_dir}; {expected}")
        train(run, check_data=None if config.allow_changes else partial(record.check_data, folder))
    compared = compare_runs(folder, output)
    if PartialState().is_main_process:
        write_json(output / COMPARISON_FILE, compared.to_json())
    return compared


def _repeated(record: RunRecord, folder: Path, output: Path, moved: dict[str, Any]) -> TrainConfig:
    """Return the config of the repetition."""
    config = recorded_config(record, folder)
    if moved.get("instance_data_dir") and config.concepts_list is not None:
        expected = "expected the folders that the list names; correct them there"
        raise UserError(
            f"instance_data_dir={moved['instance_data_dir']!r}: a run of {config.concepts_list}; {expected}"
        )
    asked, precision = config.mixed_precision, record.settings["mixed_precision"]
    if choose_precision(asked, compute_device()).name != precision:  # else, what the file says of it stays as it was
        asked = precision
    batches, processes = config.gradient_accumulation_steps * record.settings["num_processes"], PartialState()
    if batches % processes.num_processes:
        found = f"{processes.num_processes} processes for {batches} batches a step"
        raise UserError(f"{folder}: found {found}; expected a number of processes that divides them")
    return replace(
        config,
        **moved,
        output_dir=str(output),
        mixed_precision=asked,
        gradient_accumulation_steps=batches // processes.num_processes,
        resume_from_checkpoint=None,
        push_to_hub=False,
        hub_model_id=None,
    )


@contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    """Make a `with` block in which relative paths begin in a folder, if that is still there."""
    before = Path.cwd()
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
