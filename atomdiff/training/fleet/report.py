"""What a fleet leaves: a report with a row for each subject, and the library of all concepts."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.training.fleet.state import SubjectState
from atomdiff.training.report.write import RECORD_FILE
from atomdiff.utils.atomic import new_file, write_json, write_text
from atomdiff.utils.tables import to_csv, to_markdown

LIBRARY_FOLDER = "library"
TABLE_FILE, CSV_FILE, JSON_FILE = "report.md", "report.csv", "report.json"


@dataclass(frozen=True)
class FleetReport:
    """What has become of the subjects of a fleet."""

    folder: Path
    subjects: dict[str, dict[str, Any]]
    """By name: `status`, `tries`, `seconds`, `error`, and figures of the run's own report."""
    seconds: float
    """What this call took."""
    num_workers: int

    def count(self, status: str) -> int:
        """Return how many subjects have a status."""
        return sum(subject["status"] == status for subject in self.subjects.values())

    def describe(self) -> str:
        """Return it in two lines."""
        counted = {status: self.count(status) for status in ("done", "failed", "waiting", "running")}
        texts = [f"{count} {status}" for status, count in counted.items() if count or status == "done"]
        workers = f"{self.num_workers} worker{'s' * (self.num_workers != 1)}"
        return (
            f"{len(self.subjects)} subjects: {', '.join(texts)}; {self.seconds:.0f} s with {workers}\n"
            f"{self.folder / TABLE_FILE}, {self.folder / LIBRARY_FOLDER}"
        )


def write_report(folder: Path, states: Mapping[str, SubjectState], seconds: float, num_workers: int) -> FleetReport:
    """Write what is known of all subjects to `report.md`, `.csv` and `.json`; return it.

    Raises:
        WriteError: It cannot be written.
    """
    subjects = {name: _describe(state) for name, state in states.items()}
    report = FleetReport(folder, subjects, round(seconds, 1), num_workers)
    rows = [{"subject": name, **values} for name, values in subjects.items()]
    write_text(folder / CSV_FILE, to_csv(rows))
    write_text(folder / TABLE_FILE, f"# Fleet\n\n{report.describe()}\n\n{to_markdown(rows)}")
    tries = {name: [asdict(each) for each in state.tries] for name, state in states.items()}
    content = {"seconds": report.seconds, "num_workers": num_workers, "subjects": subjects, "tries": tries}
    write_json(folder / JSON_FILE, content)
    return report


def _describe(state: SubjectState) -> dict[str, Any]:
    """Return a row of the report; what a run has not measured is None."""
    record: dict[str, Any] = {}
    if state.status == "done":
        with suppress(OSError, ValueError):  # it could not be written, or somebody has removed it
            record = json.loads((state.folder / RECORD_FILE).read_bytes())
    measured = {line["step"]: line for line in record.get("measurements", [])}.get(record.get("step"), {})
    return {
        "status": state.status,
        "tries": len(state.tries),
        "seconds": round(state.seconds, 1),
        "verdict": ", ".join(finding["verdict"] for finding in record.get("findings", [])) or None,
        "final_loss": record.get("final_loss"),
        "validation_loss": measured.get("validation_loss"),
        "base_drift": measured.get("base_drift"),
        "file_bytes": record.get("file_bytes"),
        "error": state.error,
    }


def fill_library(folder: Path, states: Mapping[str, SubjectState]) -> None:
    """Copy the concept files of all subjects that are done to `library/NAME.atoms.safetensors`.

    Results of other methods, which are folders, stay where they are.

    Raises:
        WriteError: One cannot be written.
    """
    for name, state in states.items():
        if state.status != "done" or not state.result.is_file():
            continue
        target = folder / LIBRARY_FOLDER / f"{name}{CONCEPT_SUFFIX}"
        if not target.is_file() or not filecmp.cmp(state.result, target, shallow=False):
            with new_file(target) as file:
                shutil.copyfile(state.result, file)
