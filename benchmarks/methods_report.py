"""The table and the plots of a comparison of methods, from its result files.

    python -m benchmarks.methods_report

writes the plots to docs/images, and them and the table between the two marks of docs/benchmarks.md. Methods that have
no result file are listed as not run.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.atomic import new_file, write_text
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from benchmarks.experiments import ordered_methods
from benchmarks.methods_plots import Point, draw_frontier, draw_tradeoffs, frontier
from benchmarks.trial_figures import summarize

KINDS = ("in span", "hard")
REFERENCE = "atoms/default"  # the method whose gain others are compared with
START, END = "<!-- methods: made by benchmarks/methods_report.py -->", "<!-- methods: end -->"
QUALITY = (
    "method",
    *(f"{name}, {kind}" for name in ("similarity", "gain") for kind in KINDS),
    f"gain beside `{REFERENCE}`",
    "scenes",
    "drift",
    "prior similarity",
    "diversity",
    "prompt match",
    "top-1",
    "seeds",
)
COSTS = ("method", "parameters", "tensors", "file", "a step, over LoRA r16", "memory")
MARKS: dict[str, tuple[Callable[[Mapping[str, Any]], bool], str]] = {
    "†": (
        lambda figures: bool(figures.get("at_end_of_search")),
        "the best learning rate is at an end of the search: another may be better",
    ),
    "‡": (
        lambda figures: figures.get("within_allowance") is False,
        "no learning rate keeps within the allowance of drift and scenes: this is the one of least drift",
    ),
}
"""What marks a method in the table: whether it is so, by its figures, and what that means."""
PLOTS = {
    "methods_bytes": ("Similarity against the bytes of the tensors, with the frontier", draw_frontier),
    "methods_tradeoffs": ("Similarity against prompt match, drift and diversity", draw_tradeoffs),
}
"""File -> title, and what draws it."""
Methods = dict[str, dict[str, Any]]
"""Method -> its result file."""
Steps = Mapping[str, Any]
"""The result file of `training_step_toybox.py`; empty: there is none."""


@dataclass(frozen=True)
class ReportConfig:
    """Make the table and the plots of a comparison."""

    results: str = "benchmarks/results/methods"
    """Folder of the result files."""
    page: str | None = "docs/benchmarks.md"
    """Page that plots and table are written into, between its marks; none: the table is printed."""
    images: str = "docs/images"
    """Folder of the plots."""
    steps: str = "benchmarks/results/training_step_toybox.json"
    """Result file of a training step of each method; where there is none, its column stays empty."""


def read_methods(folder: Path) -> Methods:
    """Read the result files of a comparison, in the order of the methods.

    Raises:
        UserError: there are none, or two were measured under other conditions.
    """
    found = {content["method"]: content for content in (json.loads(f.read_text()) for f in folder.glob("*.json"))}
    if not found:
        raise UserError(f"{folder}: found no result file; run python -m benchmarks.compare_methods first")
    first: tuple[str, Mapping[str, Any]] | None = None
    for method, content in found.items():
        if (conditions := content.get("conditions")) is None:  # it failed before
            continue
        first = first or (method, conditions)
        names = sorted({*conditions, *first[1]} - {"seeds", "trials"})
        if others := [name for name in names if conditions.get(name) != first[1].get(name)]:
            message = f"{folder}: {first[0]} and {method} were measured with other {', '.join(others)}"
            raise UserError(f"{message}; expected files of one comparison: run it again for one of them")
    order = [*ordered_methods(), *sorted(found)]
    return {method: found[method] for method in dict.fromkeys(order) if method in found}


def read_steps(file: Path) -> Steps:
    """Read the result file of a training step; empty: there is none."""
    found: Steps = json.loads(file.read_text()) if file.is_file() else {}
    return found


def points_of(methods: Methods) -> list[Point]:
    """Return the methods that have succeeded, as the plots show them."""
    points = []
    for method, content in methods.items():
        if content["status"] == "done":
            found = content["summary"]["all"]
            values = {name: (each["mean"], each["standard_error"] or 0.0) for name, each in found.items()}
            points.append(Point(method, content["figures"]["tensor_bytes"], values))
    return points


def make_table(methods: Methods, steps: Steps) -> str:
    """Return tables of quality and costs in Markdown, with what there is to know beside them."""
    done = {method: content for method, content in methods.items() if content["status"] == "done"}
    quality, costs = ([_line(columns), _line(["---"] * len(columns))] for columns in (QUALITY, COSTS))
    notes = []
    if done:
        quality += _reference_lines(next(iter(done.values()))["summary"])
        notes.append(_conditions({method: content["conditions"] for method, content in done.items()}))
    reference = done.get(REFERENCE, {"runs": []})
    quality += [_line(_quality_cells(method, content, reference)) for method, content in done.items()]
    costs += [_line(_cost_cells(method, content["figures"], steps)) for method, content in done.items()]
    if best := frontier(points_of(methods)):
        names = ", ".join(f"`{point.method}`" for point in best)
        notes.append(f"On the frontier of similarity and bytes: {names}.")
    marked = "".join(_marks(content["figures"]) for content in done.values())
    notes += [f"{mark} {text}." for mark, (_, text) in MARKS.items() if mark in marked]
    notes += [f"`{method}` failed: {_message(each)}." for method, each in methods.items() if method not in done]
    notes += [
        f"`{method}` failed in {len(each['failed'])} runs ({_message(each)}); the subjects of these are left out."
        for method, each in done.items()
        if each["failed"]
    ]
    if missing := [f"`{method}`" for method in ordered_methods() if method not in methods]:
        notes.append(f"Not run: {', '.join(missing)}.")
    machines = dict.fromkeys(content["machine"] for content in done.values())
    notes.append(f"Memory: {'; '.join(machines)}." if machines else "No method has succeeded.")
    if steps:
        notes.append(f"Steps: {steps['machine']}.")
    return "\n".join([*quality, "", *costs, "", *(f"- {note}" for note in notes)])


def _conditions(by_method: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what all methods were measured with, and how the learning rate of each was found."""
    rates: dict[str, list[str]] = {}
    for method, conditions in by_method.items():
        rates.setdefault(_rate(conditions), []).append(f"`{method}`")
    usual = max(rates, key=lambda rate: len(rates[rate]))
    others = [f"; {', '.join(methods)}: {rate}" for rate, methods in rates.items() if rate != usual]
    subjects = next(iter(by_method.values()))["subjects"]
    return f"Subjects: {', '.join(subjects)}. Every method has {usual}{''.join(others)}."


def _rate(conditions: Mapping[str, Any]) -> str:
    if conditions["trials"] == 1:
        return "its own learning rate, without a search"
    allowance = f"that keep within a drift of {_number(conditions['max_drift'])} on the tuning subjects"
    return f"the best of at most {conditions['trials']} learning rates {allowance}"


def _message(content: Mapping[str, Any]) -> str:
    return str(content["failed"][0]["message"]).rstrip(".")


def _marks(figures: Mapping[str, Any]) -> str:
    return "".join(mark for mark, (applies, _) in MARKS.items() if applies(figures))


def _reference_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the rows of the base and of unseen photos, which all methods share."""

    def cell(kind: str, name: str) -> str:
        return _number(summary[kind][name]["mean"]) if kind in summary and name in summary[kind] else ""

    base, photos = ([cell(kind, f"similarity_{name}") for kind in KINDS] for name in ("base", "real"))
    rest = [cell("all", f"{name}_base") for name in ("scenes", "drift", "prior", "diversity", "prompt_match")]
    return [
        _line(["the base", *base, *[""] * 3, *rest, "", ""]),
        _line(["photos", *photos, *[""] * 10]),
    ]


def gain_beside(content: Mapping[str, Any], reference: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the mean difference of a method's gain from that of a reference, with its error over subjects.

    Paired: only runs count whose subject and seed the other has, too; None: there are none.
    """
    gains = {(run["subject"], run["seed"]): run["gain"] for run in reference["runs"]}
    differences: dict[str, list[float]] = {}
    for run in content["runs"]:
        if (key := (run["subject"], run["seed"])) in gains:
            differences.setdefault(run["subject"], []).append(run["gain"] - gains[key])
    means = {subject: [{"gain": statistics.mean(each)}] for subject, each in differences.items()}
    return summarize(means)["gain"] if means else None


def _quality_cells(method: str, content: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    summary = content["summary"]

    def cell(kind: str, name: str) -> str:
        return _estimate(summary[kind][name]) if kind in summary and name in summary[kind] else ""

    cells = [cell(kind, name) for name in ("similarity", "gain") for kind in KINDS]
    beside = None if content is reference else gain_beside(content, reference)
    cells.append("" if beside is None else _estimate(beside))
    cells += [cell("all", name) for name in ("scenes", "drift", "prior", "diversity", "prompt_match", "top_1")]
    cells.append(", ".join(map(str, content["conditions"]["seeds"])))
    return [f"`{method}`{_marks(content['figures'])}", *cells]


def _cost_cells(method: str, figures: Mapping[str, Any], steps: Steps) -> list[str]:
    tensors, file, memory = (format_size(figures[name]) for name in ("tensor_bytes", "bytes", "peak_memory_bytes"))
    step = steps.get("figures", {}).get(f"{method}:over_lora")
    return [
        f"`{method}`",
        f"{figures['parameters']:,}",
        tensors,
        file,
        "" if step is None else _number(step, 2),
        memory,
    ]


def _estimate(found: Mapping[str, Any]) -> str:
    error = "" if found["standard_error"] is None else f" ± {_number(found['standard_error'])}"
    return _number(found["mean"]) + error


def _number(value: float, digits: int = 3) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def format_size(count: float) -> str:
    """Return bytes as people read them: 51,916 -> "51.9 KB"."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if count >= each[0]), (1e3, "KB"))
    return f"{count / unit:.1f} {name}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_page(page: Path, content: str) -> None:
    """Write the content between the marks of a page.

    Raises:
        UserError: it has no marks.
    """
    before, found, rest = page.read_text("utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise UserError(f"{page}: found no lines {START!r} and {END!r}; add them where the table shall be")
    write_text(page, f"{before}{START}\n\n{content}\n\n{END}{after}")


def plots(page: Path, images: Path) -> str:
    """Return the plots as a page links to them."""
    folder = os.path.relpath(images, page.parent)
    return "\n\n".join(f"![{title}]({folder}/{name}.png)" for name, (title, _) in PLOTS.items())


def main(config: ReportConfig) -> None:
    """Make the table and the plots."""
    methods, images = read_methods(Path(config.results)), Path(config.images)
    table, points = make_table(methods, read_steps(Path(config.steps))), points_of(methods)
    for name, (_, draw) in PLOTS.items() if points else ():
        with new_file(images / f"{name}.png") as file:
            draw(points).savefig(file, dpi=160, format="png", transparent=True)
    if config.page is None:
        print(table)
    else:
        page = Path(config.page)
        write_page(page, f"{plots(page, images)}\n\n{table}" if points else table)


if __name__ == "__main__":
    main(parse_config(ReportConfig, prog="python -m benchmarks.methods_report"))
