"""The curves of a training run: the loss of its steps, the losses at fixed noise, and the base drift."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_INK = "#7a7a7b"  # readable on light and on dark; as a color of a page it becomes that of its text
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.labelcolor": _INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "atomdiff",
}
_LINES = {
    "validation_loss": ("held-out images", "#d9730d"),
    "training_images_loss": ("training images", "#2f7ed8"),
    "base_drift": ("base drift", "#3a9b5c"),
}


def draw_curves(
    log: Sequence[Mapping[str, Any]], measurements: Sequence[Mapping[str, Any]], saved_step: int | None
) -> Figure:
    """Draw the loss of a training log, and below it the measurements of a validation log, if there are any.

    A line marks the step whose parameters were saved; None: the run goes on.
    """
    rows = 1 + 2 * bool(measurements)
    heights = [3, 4, 2][:rows]
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.5, 1 + 0.55 * sum(heights)), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        axes[0].plot([line["step"] for line in log], [line["loss"] for line in log], color=_INK, linewidth=1)
        axes[0].set_title("training loss", loc="left", fontsize=10)
        for axis, names in zip(axes[1:], (("validation_loss", "training_images_loss"), ("base_drift",)), strict=False):
            for name in names:
                points = [(line["step"], line[name]) for line in measurements if name in line]
                label, color = _LINES[name]
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)
            if saved_step is not None:
                axis.axvline(saved_step, color=_INK, linewidth=1, linestyle=":")
            axis.legend(loc="best", fontsize=9)
        if measurements:
            marked = "" if saved_step is None else f" (dotted: step {saved_step}, saved)"
            axes[1].set_title(f"loss at fixed noise{marked}", loc="left", fontsize=10)
            axes[2].set_ylim(bottom=0)
        axes[-1].set_xlabel("step")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.patch.set_alpha(0)
        return figure


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for a page, in whose color its texts are."""
    file = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
