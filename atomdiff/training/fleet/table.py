"""The table of subjects: a row for each, with options of its training run as columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from atomdiff.data.image_files import list_images
from atomdiff.training.config import TrainConfig
from atomdiff.training.config.fleet import FleetConfig
from atomdiff.training.config.output import HubConfig
from atomdiff.training.config.train import TrainingBaseConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_values
from atomdiff.utils.options import read_cell
from atomdiff.utils.paths import expand_path
from atomdiff.utils.text_files import read_text, read_yaml

NAME, IMAGES = "name", "instance_data_dir"
SUBJECTS_FOLDER = "subjects"

_SAFE_NAME = re.compile(r"\w[\w.-]{0,63}")
# All subjects share the base; the others are the fleet's own, or name what belongs to the adapter, or to all.
_SHARED = {field.name for group in (TrainingBaseConfig, HubConfig) for field in fields(group)}
_SHARED |= {"adapter", "output_dir", "concepts_list", "one_file", "resume_from_checkpoint"}
_COLUMNS = [field.name for field in fields(TrainConfig) if field.name not in _SHARED]
_REFUSED = ("concepts_list", "one_file", "resume_from_checkpoint", "push_to_hub")


@dataclass(frozen=True)
class FleetSubject:
    """A row of the table."""

    name: str
    run: TrainConfig
    """Its training run, which goes on from its own checkpoint, if there is one."""


def read_subjects(config: FleetConfig, run: Mapping[str, Any]) -> list[FleetSubject]:
    """Read the table of subjects, and make a training run of each row.

    Args:
        config: Of the fleet.
        run: Values of `TrainConfig` that all subjects share, by field.

    Raises:
        UserError: The table cannot be read, or a row cannot be trained; the message names file, row (the first below
            the header is 1) and column.
    """
    for field in _REFUSED:
        if run.get(field):
            raise UserError(f"{field}={run[field]!r}: expected none: {_WHY_REFUSED[field]}")
    file = Path(config.subjects)
    rows = _read_rows(file)
    names: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        name = _check_name(f"{file}: row {number}", row)
        first = names.setdefault(name.casefold(), number)
        if first != number:
            found = f"{name!r}, as row {first} has it"
            raise UserError(f"{file}: row {number}, column {NAME}: found {found}; expected a name of its own")
    hints = get_type_hints(TrainConfig)
    subjects = []
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {number} ({row[NAME]})"
        cells = {column: _value(value, hints[column]) for column, value in row.items() if column != NAME}
        try:
            subjects.append(FleetSubject(row[NAME], _subject_run(config, {**run, **cells}, row[NAME])))
        except UserError as error:
            column = next((name for name in row if str(error).startswith(f"{name}=")), None)
            raise UserError(f"{where}{f', column {column}' if column else ''}: {error}") from error
        _check_folders(where, subjects[-1].run)
    return subjects


_WHY_REFUSED = {
    "concepts_list": "the table has the subjects",
    "one_file": "each subject has a file of its own",
    "resume_from_checkpoint": "the same command goes on",
    "push_to_hub": "push the concepts that you have looked at",
}


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the cells of a table, without the empty ones, and check the columns."""
    rows = _read_csv(file) if file.suffix.lower() == ".csv" else _read_list(file)
    if not rows:
        raise UserError(f"{file}: found no subjects; expected a row for each")
    for number, row in enumerate(rows, 1):
        for column in row:
            if column in _SHARED:
                raise UserError(f"{file}: row {number}, column {column}: all subjects share it; give it as an option")
            if column != NAME and column not in _COLUMNS:
                expected = f"expected {NAME} or an option of atomdiff train (atomdiff train --help lists them)"
                raise UserError(f"{file}: row {number}: found an unknown column {column!r}; {expected}")
        for column in (NAME, IMAGES):
            if column not in row:
                raise UserError(f"{file}: row {number}, column {column}: found nothing; expected a value")
    return rows


def _read_csv(file: Path) -> list[dict[str, Any]]:
    lines = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        head, *rows = [[cell.strip() for cell in line] for line in lines if any(map(str.strip, line))] or [[]]
    except csv.Error as error:
        raise UserError(f"{file}: line {lines.line_num} cannot be read as CSV ({error})") from error
    if repeated := sorted({column for column in head if head.count(column) > 1}):
        raise UserError(f"{file}: found the column {repeated[0]!r} twice")
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            found = f"{len(row)} cells for {len(head)} columns ({', '.join(head)})"
            raise UserError(f'{file}: row {number}: found {found}; put texts with a comma in "quotes"')
    return [{column: cell for column, cell in zip(head, row, strict=True) if cell} for row in rows]


def _read_list(file: Path) -> list[dict[str, Any]]:
    rows = read_yaml(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        expected = f"a list of mappings, one a subject, each with {NAME} and {IMAGES}; or a file .csv"
        raise UserError(f"{file}: expected {expected}")
    return [{str(column): cell for column, cell in row.items() if cell is not None} for row in rows]


def _value(cell: Any, hint: Any) -> Any:
    """Return the value of a cell for a field of that type."""
    return read_cell(cell, hint) if isinstance(cell, str) else tuple(cell) if isinstance(cell, list) else cell


def _check_name(where: str, row: Mapping[str, Any]) -> str:
    """Return the name of a row, if a folder and a file may have it."""
    name = row[NAME]
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        expected = "expected a text of letters, digits, _, - and ., at most 64, which begins with a letter or digit"
        raise UserError(f"{where}, column {NAME}: found {name!r}; {expected}")
    return name


def _subject_run(config: FleetConfig, values: Mapping[str, Any], name: str) -> TrainConfig:
    """Return the training run of a subject; it shares caches and class images with the others."""
    folder = Path(config.output_dir)
    own = {
        "output_dir": str(folder / SUBJECTS_FOLDER / name),
        "cache_dir": values.get("cache_dir") or str(folder / "cache"),
        "resume_from_checkpoint": "latest",
    }
    run = TrainConfig(**{**values, **own})
    if not run.with_prior_preservation or run.class_data_dir is not None:
        return run
    generated_with = (run.resolution or 0, run.num_inference_steps, run.guidance_scale, run.num_class_images)
    key = hash_values(run.subjects[0].fill(run.class_prompt), *generated_with, run.sample_batch_size)
    return TrainConfig(**{**values, **own, "class_data_dir": str(folder / "class_images" / key[:16])})


def _check_folders(where: str, run: TrainConfig) -> None:
    """Check that there are images."""
    for column in (IMAGES, "validation_data_dir"):
        folder = getattr(run, column)
        if folder is None:
            continue
        if not Path(expand_path(folder, column)).is_dir():
            raise UserError(f"{where}, column {column}: found no folder {folder}; check the path")
        if not list_images(Path(folder)):
            raise UserError(f"{where}, column {column}: found no images in {folder}")
