"""The record of a run: its settings, its data, what it ran on and what came out, so that it can be repeated."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from atomdiff.training.config import TrainConfig
from atomdiff.training.fingerprint import differences
from atomdiff.training.run import Run
from atomdiff.utils.atomic import WriteError, write_json
from atomdiff.utils.errors import UserError
from atomdiff.utils.git import git_state
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.machine import describe_device, describe_processor
from atomdiff.utils.versions import package_versions

RECORD_FILE = "run_record.json"

_FORMAT = 1  # raised whenever the names in the file change


@dataclass(frozen=True)
class RunRecord:
    """What `run_record.json` in a run's folder holds."""

    config: dict[str, Any]
    """All options, as they were given, but for the access token."""
    settings: dict[str, Any]
    """What the trained parameters depend on, as resolved: learning rates, precision, processes, adapter."""
    data: dict[str, Any]
    """Keys of the base's parts, of images, prompts and masks, see `fingerprint.py`."""
    environment: dict[str, Any]
    """Python, system, processor, device, versions of packages, and git state of the package and of the script."""
    working_directory: str
    """Where relative paths of the config begin."""
    result: dict[str, Any] | None = None
    """Name and SHA-256 of what was saved, of which step, and the average loss at the end; None: the run has not ended.
    """

    def check_data(self, folder: Path, now: dict[str, Any]) -> None:
        """Check that another run learns from the same images and base.

        Args:
            folder: Of the run that this is the record of, for the message.
            now: As `data`.

        Raises:
            UserError: It does not.
        """
        if changes := differences(self.data, now):
            expected = "expected what that run learned from: restore it, or compare all the same with --allow_changes"
            raise UserError(f"{folder}: found {'; '.join(changes)}; {expected}")


def start_record(run: Run, settings: dict[str, Any]) -> RunRecord:
    """Write the record of a run that begins, and return it.

    Raises:
        WriteError: It cannot be written.
    """
    config = asdict(run.config)
    del config["hub_token"]
    data = json.loads(json.dumps(dict(run.dataset.fingerprint)))
    record = RunRecord(config, settings, data, describe_environment(), str(Path.cwd()))
    _write(Path(run.config.output_dir), record)
    return record


def finish_record(run: Run, record: RunRecord, path: Path, step: int, final_loss: float) -> None:
    """Add to a run's record what was saved at `path`, of the parameters of `step`.

    What cannot be written is warned of: the result is saved.
    """
    result = {"name": path.name, "sha256": hash_file(path), "step": step, "final_loss": final_loss}
    try:
        _write(Path(run.config.output_dir), RunRecord(**{**vars(record), "result": result}))
    except WriteError as error:
        warnings.warn(f"{path} is saved, but not noted in the run's record: {error}", stacklevel=1)


def read_record(folder: Path) -> RunRecord:
    """Read the record in a run's folder.

    Raises:
        UserError: There is none, or it is damaged or of another version of atomdiff.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        runs = sorted(each.parent.name for each in folder.glob(f"*/{RECORD_FILE}"))
        hint = f"; it is in {', '.join(runs)}: name one of them" if runs else ""
        if (folder / "classifier").is_dir():
            hint = "; runs of `atomdiff classify` leave none: run it again with the config in report.json"
        raise UserError(f"{folder}: found no {RECORD_FILE}; expected the output_dir of a run of atomdiff train{hint}")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); restore it from a copy") from error
    names = {field.name for field in fields(RunRecord)}
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT or content.keys() != names:
        raise UserError(f"{file}: of another version of atomdiff, or damaged; expected format {_FORMAT}: use that one")
    return RunRecord(**content)


def finished_result(folder: Path, settings: dict[str, Any], *, keep_best: bool) -> Path | None:
    """Return what a run with these settings has saved in its folder; None: it has not ended, or the file has changed.

    Args:
        folder: The run's `output_dir`.
        settings: As `RunRecord.settings`.
        keep_best: Whether the parameters with the lowest validation loss were to be saved.
    """
    try:
        record = read_record(folder)
    except UserError:
        return None
    if record.result is None or record.settings != json.loads(json.dumps(settings)):
        return None
    if record.config.get("keep_best", False) != keep_best:
        return None
    path = folder / str(record.result["name"])
    return path if path.exists() and hash_file(path) == record.result["sha256"] else None


def recorded_config(record: RunRecord, folder: Path) -> TrainConfig:
    """Return the config of a recorded run.

    Raises:
        UserError: It has options that this version lacks, or values that it refuses.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.config.items()
    }
    if unknown := sorted(values.keys() - {field.name for field in fields(TrainConfig)}):
        found = f"options that this version lacks: {', '.join(unknown)}"
        version = record.environment["packages"].get("atomdiff")
        raise UserError(f"{folder / RECORD_FILE}: found {found}; it was written by atomdiff {version}: use that one")
    return TrainConfig(**values)


def describe_environment() -> dict[str, Any]:
    """Return what a run computes with: Python, system, processor, device, packages, and git state of the code."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": describe_processor(),
        "device": describe_device(),
        "packages": package_versions(),
        "git": {
            "atomdiff": git_state(Path(__file__).resolve()),
            "script": git_state(Path(script).resolve()) if script else None,
        },
    }


def _write(folder: Path, record: RunRecord) -> None:
    write_json(folder / RECORD_FILE, {"format": _FORMAT, **asdict(record)})
