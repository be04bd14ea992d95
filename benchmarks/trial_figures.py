"""What trials found, as figures: of one trial, of the trials of a method, and the learning rate that they speak for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from atomdiff.evaluate.estimate import estimate
from atomdiff.evaluate.protocol import Protocol, load_protocol
from atomdiff.utils.errors import UserError

Result = Mapping[str, Any]
"""What `result.json` of a trial holds."""

FACTOR = 3  # between learning rates of a search
_CLOSE = 0.95  # share of the allowance of drift at which a search ends
_DIGITS = 4
_MATCHED = ("color", "pattern")


def check_protocols(names: Sequence[str], subjects: Sequence[str], photos: Path) -> None:
    """Check that protocols and photos have what the figures of trials need.

    Args:
        names: protocols of a trial.
        subjects: what is evaluated; none: all of the first protocol.
        photos: a folder for each subject.

    Raises:
        UserError: they have not.
    """
    first, *others = [load_protocol(name) for name in names]
    if not (first.subjects and first.unrelated_prompts and "scene" in _labels(first)):
        raise UserError(f"{names[0]}: expected subjects, prompts with a scene, and unrelated prompts, as toybox has")
    for name, protocol in zip(names[1:], others, strict=True):
        if _labels(protocol).isdisjoint(_MATCHED):
            raise UserError(f"{name}: expected prompts with a color or a pattern, as toybox_edits has")
    for subject in subjects or first.subjects:
        if len(first.subject(subject, None, photos, alone=False).references) < 2:
            raise UserError(f"{photos / subject}: found one photo to compare images with; expected two or more")


def _labels(protocol: Protocol) -> set[str]:
    return {kind for prompts in protocol.prompts.values() for prompt in prompts for kind in prompt.labels}


def trial_figures(result: Result) -> dict[str, float]:
    """Return the figures of a trial that has not failed.

    The first protocol tells similarity, scenes, drift and diversity; the second, if there is one, prompt match: the
    mean of the shares of images in which the judge finds the color and the pattern that were asked for.

    Raises:
        UserError: the photos leave the concept nothing to gain.
    """
    first, *others = result["metrics"].values()
    similarity = first["similarity"]
    if similarity["normalized_gain"] is None:
        found = f"the base's images are as like the photos ({similarity['base']['mean']}) as these are to one another"
        raise UserError(
            f"{result['trial']['photos']}: {found}: there is no gain to compare methods by; take other photos"
        )
    figures = {
        "similarity": similarity["concept"]["mean"],
        "similarity_base": similarity["base"]["mean"],
        "similarity_real": similarity["real"],
        "gain": similarity["normalized_gain"]["mean"],
        "drift": first["drift"]["mean"],
        "embedding_drift": first["embedding_drift"]["mean"],
    }
    if "top_1" in result:
        figures["top_1"] = result["top_1"]
    for name, metric in (("scenes", "scene_accuracy"), ("diversity", "diversity"), ("prior", "prior_similarity")):
        if first[metric] is not None:
            figures[name] = first[metric]["concept"]["mean"]
            figures[f"{name}_base"] = first[metric]["base"]["mean"]
    for edits in others:
        known = [edits[f"{kind}_accuracy"] for kind in _MATCHED if edits[f"{kind}_accuracy"] is not None]
        figures["prompt_match"] = statistics.mean(each["concept"]["mean"] for each in known)
        figures["prompt_match_base"] = statistics.mean(each["base"]["mean"] for each in known)
    return figures


def summarize(by_subject: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return mean, standard error and median of every figure.

    Runs of one subject are more alike than those of different subjects, so subjects are what is counted: the error is
    that of the mean over the subjects' means, and the median that of those.

    Args:
        by_subject: the figures of each run of each subject; of every subject as many.
    """
    names = dict.fromkeys(name for runs in by_subject.values() for run in runs for name in run)
    found = {}
    for name in names:
        values = torch.tensor([[run[name] for run in runs] for runs in by_subject.values()], dtype=torch.float64)
        error = estimate(values)
        found[name] = {
            **{key: _rounded(value) for key, value in asdict(error).items()},
            "median": _rounded(statistics.median(values.mean(1).tolist())),
        }
    return found


def summarize_kinds(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return `summarize` of all results and of each kind of subject: {"all": ..., "in span": ..., "hard": ...}.

    Subjects of which a run has failed are left out.
    """
    failed = {subject_of(result) for result in results if result["status"] == "failed"}
    kept = [result for result in results if subject_of(result) not in failed]
    kinds = dict.fromkeys(result["kind"] for result in kept)
    groups = {"all": kept} | {kind: [each for each in kept if each["kind"] == kind] for kind in kinds}
    return {kind: summarize(_by_subject(each)) for kind, each in groups.items() if each}


def subject_of(result: Result) -> str:
    """Return the subject of a trial."""
    return Path(result["trial"]["photos"]).name


def _by_subject(results: Sequence[Result]) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for result in results:
        found.setdefault(subject_of(result), []).append(trial_figures(result))
    return found


Summary = Mapping[str, Mapping[str, Any]]
"""What `summarize` returns; None in its place: a trial failed."""


def search_rate(
    own: float, trials: int, max_drift: float, measure: Callable[[float], Summary | None]
) -> tuple[float | None, bool, dict[float, Summary | None]]:
    """Search the learning rate with the highest mean gain within an allowance of drift.

    The first one is a method's own; then three times the highest one that keeps within the allowance, or a third of the
    lowest one; as soon as the allowance lies between two, the rate at which a straight line through their drifts, both
    axes logarithmic, comes close to it. It ends there. So every method comes to about the same drift, if it can.

    Args:
        own: the first learning rate.
        trials: how many are tried at most.
        max_drift: highest mean drift that is allowed.
        measure: trains at a learning rate; returns the figures.

    Returns:
        The rate, None if the trials failed at all of them; whether it keeps within the allowance; the figures at each.
    """
    found: dict[float, Summary | None] = {}
    while len(found) < trials:
        rate = _next_rate(found, max_drift) if found else own
        rate = float(f"{rate:.3g}")  # as folders of runs and result files name it
        if rate in found:  # as close as three digits tell
            break
        figures = found[rate] = measure(rate)
        if figures is not None and is_allowed(figures, max_drift) and figures["drift"]["mean"] >= _CLOSE * max_drift:
            break
    return *choose_rate(found, max_drift), found


def means_by_rate(found: Mapping[float, Summary | None]) -> dict[str, dict[str, float]]:
    """Return the means of the figures that `search_rate` found, as result files have them; of failed trials none."""
    return {
        f"{rate:g}": {name: each["mean"] for name, each in (figures or {}).items()} for rate, figures in found.items()
    }


def _next_rate(by_rate: Mapping[float, Summary | None], max_drift: float) -> float:
    within = [rate for rate, found in by_rate.items() if is_allowed(found, max_drift)]
    if not within:
        return min(by_rate) / FACTOR
    low = max(within)
    if not (beyond := [rate for rate in by_rate if rate > low]):
        return low * FACTOR
    high = min(beyond)
    drifts = [0.0 if found is None else found["drift"]["mean"] for found in (by_rate[low], by_rate[high])]
    share = 0.5  # of the way, where it is not drift that is too much at the higher rate
    aim = max_drift * (1 + _CLOSE) / 2
    if 0 < drifts[0] <= aim < drifts[1]:
        share = math.log(aim / drifts[0]) / math.log(drifts[1] / drifts[0])
    return float(low * (high / low) ** share)


def is_allowed(found: Summary | None, max_drift: float, scenes_kept: float = 0.9) -> bool:
    """Tell whether trials keep within an allowance.

    Similarity can be bought with drift and with forgotten scenes, so every method gets the same allowance.

    Args:
        found: figures of the trials; None: one of them failed.
        max_drift: highest mean drift that is allowed.
        scenes_kept: lowest scene accuracy that is allowed, over that of the base.
    """
    if found is None or not found["drift"]["mean"] <= max_drift:
        return False
    return bool(found["scenes"]["mean"] >= scenes_kept * found["scenes_base"]["mean"])


def choose_rate(by_rate: Mapping[float, Summary | None], max_drift: float) -> tuple[float | None, bool]:
    """Return the learning rate with the highest mean gain among those that are allowed.

    Where no rate keeps within the allowance, the one of the least drift is taken.

    Args:
        by_rate: figures of the trials at each rate; None: one of them failed.
        max_drift: highest mean drift that is allowed.

    Returns:
        The rate, None if the trials failed at all of them; and whether it keeps within the allowance.
    """
    known = {rate: found for rate, found in by_rate.items() if found is not None}
    allowed = [rate for rate, found in known.items() if is_allowed(found, max_drift)]
    if allowed:
        return max(allowed, key=lambda rate: float(known[rate]["gain"]["mean"])), True
    return min(known, key=lambda rate: float(known[rate]["drift"]["mean"]), default=None), False


def _rounded(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float) else value
