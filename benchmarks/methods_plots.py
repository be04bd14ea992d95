"""Plots of methods, for light and dark pages and for print: gray ink, no background, a marker for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

INK = "#7a7a7b"  # readable on light and on dark
_STYLE: dict[Any, Any] = {
    name: INK
    for name in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor", "text.color")
} | {"legend.frameon": False, "font.size": 9}
_FAMILIES = {  # colors that the color-blind can tell apart; markers for print
    "atoms": ("atoms", "#2f7ed8", "o"),
    "lora": ("LoRA", "#D55E00", "s"),
    "dora": ("LoRA", "#D55E00", "s"),
    "full": ("full tuning", "#CC79A7", "*"),
    "token": ("token alone", "#009E73", "^"),
}
_OTHERS = ("other methods", "#8c8c8c", "D")
_LABEL_PLACES = (
    ((6, 4), "left", "bottom"),
    ((-6, -4), "right", "top"),
    ((6, -4), "left", "top"),
    ((-6, 4), "right", "bottom"),
)
_MARKER_SIZE = 8  # points


@dataclass(frozen=True)
class Point:
    """A method in the plots."""

    method: str
    """Its folder under configs/experiments."""
    bytes: float
    """Bytes of its tensors."""
    values: Mapping[str, tuple[float, float]]
    """Mean and standard error by name."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the methods of which no other one is as similar with as few bytes, from the smallest to the largest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.bytes, -each.values["similarity"][0])):
        if not best or point.values["similarity"][0] > best[-1].values["similarity"][0]:
            best.append(point)
    return best


def draw_frontier(points: Sequence[Point]) -> Figure:
    """Draw similarity against bytes, with standard errors, and the frontier."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        best = frontier(points)
        line = [(point.bytes, point.values["similarity"][0]) for point in best]
        end = max(point.bytes for point in points)
        line.append((end, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", color=INK, linewidth=1, linestyle="--", label="frontier")
        axes.set_xscale("log")
        sizes = {point.method: (point.bytes, 0.0) for point in points}
        _scatter(axes, points, sizes)
        axes.set_xlabel("bytes of the tensors, in float16")
        axes.set_ylabel("similarity to unseen photos")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        figure.draw_without_rendering()
        _name_points(axes, [*best, *points], sizes)
        return figure


def draw_tradeoffs(points: Sequence[Point]) -> Figure:
    """Draw prompt match, drift and diversity against similarity, with standard errors, as far as they were measured.

    A line marks the base's prompt match and diversity.
    """
    names = [name for name in ("prompt_match", "drift", "diversity") if name in points[0].values]
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.4 * len(names), 4.2), layout="constrained")
        all_axes = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
        values = {name: {point.method: point.values[name] for point in points} for name in names}
        for name, axes in all_axes.items():
            _scatter(axes, points, values[name])
            if (of_base := points[0].values.get(f"{name}_base")) is not None:
                axes.axvline(of_base[0], color=INK, linewidth=1, linestyle=":", label="the base")
            axes.set_xlabel(name.replace("_", " ") + (" (less is better)" if name == "drift" else ""))
            axes.set_ylabel("similarity to unseen photos")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        figure.draw_without_rendering()
        for name, axes in all_axes.items():
            _name_points(axes, [*frontier(points), *points], values[name])
        return figure


def draw_keep(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Draw similarity, prompt match and drift over the share of the directions that is kept, with standard errors.

    Args:
        summaries: `summary` of the result file of `benchmarks/keep.py`: share -> figures.
    """
    shares = sorted(summaries, key=float)
    names = [name for name in ("similarity", "prompt_match", "drift") if name in summaries[shares[0]]]
    _, color, marker = _FAMILIES["atoms"]
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            found = [summaries[share][name] for share in shares]
            means, errors = [each["mean"] for each in found], [each["standard_error"] or 0.0 for each in found]
            axes.errorbar([*map(float, shares)], means, errors, color=color, marker=marker, elinewidth=0.8)
            axes.set_xlabel("share of the directions")
            axes.set_ylabel(name.replace("_", " ") + (" (less is better)" if name == "drift" else ""))
            axes.grid(alpha=0.25)
            axes.patch.set_alpha(0)
        return figure


def _scatter(axes: Axes, points: Sequence[Point], values: Mapping[str, tuple[float, float]]) -> None:
    """Draw similarity against other values by method, both with standard errors."""
    seen = set()
    for point in points:
        label, color, marker = _FAMILIES.get(point.method.partition("/")[0], _OTHERS)
        (x, x_error), (y, y_error) = values[point.method], point.values["similarity"]
        axes.errorbar(
            x,
            y,
            y_error,
            x_error or None,
            color=color,
            marker=marker,
            markersize=9 if marker == "*" else 6,
            markerfacecolor="none" if label == _OTHERS[0] else color,
            elinewidth=0.8,
            alpha=0.9,
            label=None if label in seen else label,
        )
        seen.add(label)
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)


def _name_points(axes: Axes, points: Sequence[Point], values: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of methods beside their markers, where there is room; the first ones choose first.

    Args:
        axes: with what `_scatter` drew, and laid out.
        points: the methods; that some stand there twice does not matter.
        values: as for `_scatter`.
    """
    at = {point.method: (values[point.method][0], point.values["similarity"][0]) for point in points}
    half = _MARKER_SIZE / 2 * axes.figure.dpi / 72  # pixels
    markers = axes.transData.transform([*at.values()])
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in markers]
    for method, place in at.items():
        text = method.removesuffix("/default").replace("attention_", "")
        for offset, ha, va in _LABEL_PLACES:
            label = axes.annotate(text, place, offset, textcoords="offset points", fontsize=7, color=INK, ha=ha, va=va)
            box = label.get_window_extent()
            if Bbox.union([axes.bbox, box]).bounds == axes.bbox.bounds and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()
