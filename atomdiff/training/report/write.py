"""Writing the report of a run: `training_report.json` for programs, `report.md` and `report.html` for people."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.layer_choice import count_by_block
from atomdiff.evaluate.size import num_trainable_parameters, stored_bytes
from atomdiff.training.anomalies import DivergedError
from atomdiff.training.config import TrainConfig
from atomdiff.training.contact_sheet import list_row_files, row_files
from atomdiff.training.report.page import Page, Table
from atomdiff.training.report.verdict import Finding, judge
from atomdiff.training.run import Run
from atomdiff.training.run_log import LOG_FILE, read_log
from atomdiff.utils.atomic import new_file, write_json, write_text
from atomdiff.utils.progress import log
from atomdiff.utils.versions import versions

RECORD_FILE = "training_report.json"
"""What the pages are made from."""
PAGES = ("report.md", "report.html")
CURVE_FILE = "training_curve.png"

_WRONG = ("Numbers that went wrong", ("step", "found", "images"))
_ROWS = 12  # of measurements that the page shows
_MEASURED = {
    "step": "step",
    "validation_loss": "held-out images",
    "training_images_loss": "training images",
    "base_drift": "base drift",
}


def report(run: Run, path: Path, step: int, final_loss: float) -> None:
    """Write the report of a run whose result, of the parameters of `step`, is at `path`.

    What goes wrong is warned of: nothing of the training is lost with it.
    """
    folder = Path(run.config.output_dir)
    with _warning_of_errors(f"{path} is saved, but its report cannot be written"):
        _remove_report(folder)
        record = describe_run(run, path, step, final_loss)
        write_json(folder / RECORD_FILE, record, indent=2)
        write_pages(folder)
        verdict = ", ".join(finding["verdict"] for finding in record["findings"])
        log(f"report: {folder / 'report.html'} ({verdict})")


@contextmanager
def reporting_divergence(run: Run) -> Iterator[None]:
    """Make a `with` block that leaves a report if numbers in it are not finite any more: why the run has ended.

    Raises:
        DivergedError: As the block.
    """
    try:
        yield
    except DivergedError as error:
        if run.accelerator.is_main_process:
            with _warning_of_errors("the report cannot be written"):
                _remove_report(Path(run.config.output_dir))
                _write_divergence(run, error)
        raise


def _write_divergence(run: Run, error: DivergedError) -> None:
    """Write the pages of a run that has ended with an error: why, and what was measured until then."""
    folder, values = Path(run.config.output_dir), run.measurements.values
    advice = f"{error.advice[0].upper()}{error.advice[1:]}."
    finding = asdict(Finding("diverged", f"Step {error.step}: {error.found}.", advice))
    last = [error.step, error.found, ", ".join(error.images)]
    tables = [Table(*_WRONG, [*_spike_rows(_loss_spikes(run)), last]), _measured(values)]
    images = _contact_sheet(folder, run.config.validation_steps > 0 and bool(list_row_files(folder)))
    _write(folder, Page(f"Training of {run.config.trigger_phrase}", [finding], images, tables), values, None)


def _remove_report(folder: Path) -> None:
    """Remove the report of an earlier run."""
    for name in (RECORD_FILE, CURVE_FILE, *PAGES):
        (folder / name).unlink(missing_ok=True)


def _loss_spikes(run: Run) -> list[dict[str, Any]]:
    """Return the loss spikes of a run: those in its log, of earlier processes too, and those not yet noted there."""
    logged = read_log(Path(run.config.output_dir) / LOG_FILE)
    spikes = [*(spike for line in logged for spike in line.get("loss_spikes", [])), *run.loss_spikes]
    return list({spike["step"]: spike for spike in spikes}.values())


def _spike_rows(spikes: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [[spike["step"], f"loss {spike['loss']:.4g}", ", ".join(spike["images"])] for spike in spikes]


def extend_report(folder: Path, metrics: Mapping[str, Any], images: Mapping[str, Path], note: str = "") -> None:
    """Write the pages of a report anew, with metrics and more images, unless training could not write them."""
    if (folder / RECORD_FILE).is_file():
        with _warning_of_errors(f"{folder / 'report.html'} cannot be extended"):
            write_pages(folder, metrics, images, note)


@contextmanager
def _warning_of_errors(what: str) -> Iterator[None]:
    """Warn of errors of any kind: a full disk, a damaged log or image, fonts that matplotlib cannot read."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{what}: {reason}", stacklevel=1)


def describe_run(run: Run, path: Path, step: int, final_loss: float) -> dict[str, Any]:
    """Return what is known of a finished run, ready for JSON."""
    config, values = run.config, run.measurements.values
    seconds = _training_seconds(read_log(Path(config.output_dir) / LOG_FILE), run.samples_per_step)
    preserved = config.preservation != "none" or config.with_prior_preservation
    findings = judge(values, step, preserved=preserved)
    held_out = [image[0] for image in run.dataset.fingerprint["held_out_images"]]
    sheet = bool(config.validation_steps and row_files(Path(config.output_dir), config.max_train_steps))
    return {
        "concept": path.name,
        "trigger_phrase": config.trigger_phrase,
        "findings": [asdict(finding) for finding in findings],
        "step": step,
        "max_train_steps": config.max_train_steps,
        "file_bytes": stored_bytes(path),
        "num_trainable_parameters": _num_parameters(run, path),
        "train_seconds": round(seconds, 1),
        "seconds_per_step": round(seconds / config.max_train_steps, 4),
        "final_loss": final_loss,
        "image_count": run.dataset.num_instance_images,
        "held_out_images": held_out,
        "measurements": values,
        "loss_spikes": _loss_spikes(run),
        "contact_sheet": sheet,
        "selected_layers": _selected_layers(run, path),
        "base_model": config.pretrained_model_name_or_path,
        "precision": f"{run.accelerator.mixed_precision} on {run.accelerator.device.type}",
        "config": config.snapshot(),
        "versions": versions(),
    }


def _num_parameters(run: Run, path: Path) -> int:
    """Return the number of parameters that were trained; those of the result, where layers have left it."""
    if run.model.layer_scores:
        return num_trainable_parameters(path)
    return sum(parameter.numel() for parameter in run.trainable.values())


def _selected_layers(run: Run, path: Path) -> str | None:
    """Return which layers the concept has, if that was learned; None where it is a folder of PEFT."""
    if not run.model.layer_scores or path.is_dir():
        return None
    concept = read_concept_file(path)
    return f"{concept.training['selected_layers']}: {count_by_block(concept.layers)}"


def write_pages(
    folder: Path,
    metrics: Mapping[str, Any] | None = None,
    images: Mapping[str, Path] | None = None,
    note: str = "",
) -> None:
    """Write `report.md`, `report.html` and the curve from what a run has left in its folder.

    Args:
        folder: The run's `output_dir`.
        metrics: Values by name, or dicts of them, for a table.
        images: More image files in the folder, by their titles.
        note: What is to be known of the metrics.
    """
    record = json.loads((folder / RECORD_FILE).read_text("utf-8"))
    shown = {**_contact_sheet(folder, record["contact_sheet"]), **(images or {})}
    tables = _tables(record, metrics or {}, note)
    page = Page(f"Training of {record['trigger_phrase']}", record["findings"], shown, tables)
    _write(folder, page, record["measurements"], record["step"])


def _write(folder: Path, page: Page, measurements: Sequence[Mapping[str, Any]], saved_step: int | None) -> None:
    """Write the curve and the pages, without the tables that are empty."""
    from atomdiff.training.report.curve import draw_curves, to_svg  # matplotlib takes a while to import

    figure = draw_curves(read_log(folder / LOG_FILE), measurements, saved_step)
    with new_file(folder / CURVE_FILE) as file:
        figure.savefig(file, dpi=120, format="png", facecolor="white")
    page = replace(page, tables=[table for table in page.tables if table.rows])
    with_curve = replace(page, images={"Curves": folder / CURVE_FILE, **page.images})
    for name, text in zip(PAGES, (with_curve.to_markdown(folder), page.to_html(to_svg(figure))), strict=True):
        write_text(folder / name, text)


def _contact_sheet(folder: Path, is_there: bool) -> dict[str, Path]:
    return {"Validation images": folder / "contact_sheet.png"} if is_there else {}


def _measured(values: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the measurements, of at most so many."""
    chosen = sorted({number * (len(values) - 1) // (_ROWS - 1) for number in range(_ROWS)}) if values else []
    rows = [[values[number].get(name) for name in _MEASURED] for number in chosen]
    return Table("Loss at fixed noise", [*_MEASURED.values()], rows)


def _tables(record: Mapping[str, Any], metrics: Mapping[str, Any], note: str) -> list[Table]:
    values = record["measurements"]
    measuring = sum(line["seconds"] for line in values)
    kept = "" if record["step"] == record["max_train_steps"] else f"; saved is step {record['step']}, the best"
    run = {
        "concept": record["concept"],
        "size": f"{record['file_bytes']:,} bytes, {record['num_trainable_parameters']:,} parameters",
        "steps": f"{record['max_train_steps']}{kept}",
        "time": f"{record['train_seconds']:.0f} s, {record['seconds_per_step']:.3g} s a step, in {record['precision']};"
        f" {measuring:.0f} s for the measurements",
        "layers": record["selected_layers"],
        "images": record["image_count"],
        "held out": ", ".join(record["held_out_images"]) or "none",
        "base": record["base_model"],
        "final loss": record["final_loss"],
    }
    return [
        Table(*_WRONG, _spike_rows(record["loss_spikes"])),
        _measured(values),
        Table("Run", ("", ""), [row for row in run.items() if row[1] is not None]),
        Table("Metrics", ("", ""), _flat(metrics), note),
        Table("Config, where it is not the default", ("", ""), _changed(record["config"])),
        Table("Versions", ("", ""), _flat(record["versions"])),
    ]


def _changed(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    defaults = {each.name: each.default for each in fields(TrainConfig)}
    return [(name, value) for name, value in config.items() if value != defaults.get(name)]


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return names and values, those of dicts one by one."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += [(f"{name}, {key}", one) for key, one in value.items()] if isinstance(value, dict) else [(name, value)]
    return rows


def _training_seconds(lines: Sequence[Mapping[str, Any]], samples_per_step: int) -> float:
    """Return the seconds that the steps of a training log took."""
    steps = [line["step"] - before["step"] for before, line in pairwise([{"step": 0}, *lines])]
    rates = [line["samples_per_second"] for line in lines]
    return sum(count * samples_per_step / rate for count, rate in zip(steps, rates, strict=True))
