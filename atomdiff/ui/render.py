"""Pieces of the page in HTML: the state of a run, its curves, its findings, tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from atomdiff.training.config import TrainConfig
from atomdiff.ui.job import Job, Status
from atomdiff.ui.progress import RunProgress, seconds_left
from atomdiff.ui.recipes import samples_per_step

_SAID: dict[Status, str] = {
    "queued": "waits for its turn",
    "running": "running",
    "stopping": "saving a checkpoint, then stopping",
    "stopped": "stopped",
    "finished": "finished",
    "failed": "ended with an error",
}
_ADVICE: dict[Status, str] = {
    "stopped": "Resume goes on from its last checkpoint.",
    "finished": "The concept is in the library; write its trigger phrase in a prompt under Try.",
}


def status_card(job: Job, progress: RunProgress, hand_over_error: str = "") -> str:
    """Return the state of a job: a bar, steps, time left, and what it said last, or why it is not in the library."""
    status, said = job.outcome
    steps = int(job.options.get("max_train_steps", TrainConfig.max_train_steps))
    share = 1.0 if status == "finished" else min(progress.step / steps, 1.0)
    facts = [f"step {progress.step} of {steps}"] if progress.step else []
    if progress.log:
        facts.append(f"loss {progress.log[-1]['loss']:.4f}")
    left = seconds_left(progress, steps, samples_per_step(job.options)) if status == "running" else None
    if left is not None:
        facts.append(f"{describe_seconds(left)} left")
    if progress.log and status == "running" and not said.startswith("warning"):
        said = ""  # the phase before
    note = _ADVICE.get(status) or said
    if status == "finished" and job.result is not None and job.result.is_dir():
        note = f"The result is in {job.result}; the library takes concept files and LoRA files only."
    if hand_over_error:
        note = f"{job.result} is not in the library yet, and is tried again: {hand_over_error}"
    return (
        f'<div class="card status-{status}"><div class="headline"><b>{escape(job.name)}</b>'
        f'<span class="badge">{_SAID[status]}</span></div>'
        f'{bar(share)}<div class="facts">{escape(" · ".join(facts))}</div>'
        f'<div class="note">{escape(note)}</div></div>'
    )


def bar(share: float) -> str:
    """Return a bar that is full at 1."""
    return f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>'


def describe_seconds(seconds: float) -> str:
    """Return a duration in words, such as "about 3 min"."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def curves(progress: RunProgress) -> str:
    """Return the curves of a run as an SVG in the colors of the page; empty before the second line of its log."""
    if len(progress.log) < 2:
        return ""
    from atomdiff.training.report.curve import draw_curves, to_svg  # matplotlib takes a while to import

    saved = progress.report["step"] if progress.report else None
    return f'<div class="curves">{to_svg(draw_curves(progress.log, progress.measurements, saved))}</div>'


def findings(progress: RunProgress) -> str:
    """Return the verdict of a run's report with its evidence and advice."""
    if progress.report is None:
        return ""
    texts = [[escape(each[part]) for part in ("verdict", "evidence", "advice")] for each in progress.report["findings"]]
    items = "".join(
        f'<div class="finding"><b>{verdict}</b> {evidence} {advice}</div>' for verdict, evidence, advice in texts
    )
    facts = {
        "concept": f"{progress.report['concept']}, {progress.report['file_bytes'] / 1000:,.1f} KB",
        "trigger phrase": progress.report["trigger_phrase"],
        "trained parameters": f"{progress.report['num_trainable_parameters']:,}",
        "training time": describe_seconds(progress.report["train_seconds"]),
    }
    return f'<div class="card"><div class="headline"><b>Report</b></div>{items}{table(facts)}</div>'


def table(rows: Mapping[str, Any]) -> str:
    """Return a table of two columns."""
    body = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="facts-table">{body}</table>'
