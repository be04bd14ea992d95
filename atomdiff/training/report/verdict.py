"""The verdict on a training run: underfit, good, overfit, or forgets the base; a pure function of its measurements.

The thresholds are shares, so that they mean the same for every base and prediction type. They say when to look closer:
images decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MIN_GAIN = 0.01
"""Hardly anything was learned if the loss fell by less, as a share of the base's loss."""
LATE_GAIN = 0.1
"""Underfit if so much of the whole fall of the validation loss came in the last quarter of the steps, or more."""
LOST_GAIN = 0.25
"""Overfit if the validation loss then rose again by so much of its whole fall, or more."""
MAX_DRIFT = 0.1
"""Forgets the base if predictions for other prompts changed by so much of their mean square, or more."""

_MORE = "More steps, or a higher --learning_rate."
_HOLD_OUT = "hold some photos out with --validation_split 0.2, or name more of them with --validation_data_dir"


@dataclass(frozen=True)
class Finding:
    """A part of the verdict."""

    verdict: Literal["underfit", "good", "overfit", "forgets the base", "unknown", "diverged"]
    evidence: str
    """Figures that it rests on."""
    advice: str
    """What to try next."""


def judge(
    measurements: Sequence[Mapping[str, Any]], saved_step: int, *, keep_best: bool = False, preserved: bool = False
) -> list[Finding]:
    """Return what the measurements of a run say: about the fit first, then, if it is so, that it forgets the base.

    Args:
        measurements: Lines of the validation log, in the order of their steps.
        saved_step: The step whose parameters were saved.
        keep_best: Whether those are of the measurement with the lowest validation loss.
        preserved: Whether the run kept the base by output or prior preservation.
    """
    training = [(line["step"], line["training_images_loss"]) for line in measurements]
    validation = [(line["step"], line["validation_loss"]) for line in measurements if "validation_loss" in line]
    if len(validation or training) < 2 or (validation or training)[0][0]:
        found = "The loss was not measured both before the first step and later."
        return [Finding("unknown", found, "Set --validation_loss_steps, and train from the first step.")]
    fit = _judge_validation(validation, training, keep_best) if validation else _judge_training(training)
    saved = next((line for line in measurements if line["step"] == saved_step), measurements[-1])
    forgets = "base_drift" in saved and saved["base_drift"] >= MAX_DRIFT
    return [fit, _forgets(saved, preserved)] if forgets else [fit]


Curve = Sequence[tuple[int, float]]
"""Steps and losses, the base's first."""


def _judge_validation(validation: Curve, training: Curve, keep_best: bool) -> Finding:
    (_, base), (last_step, last) = validation[0], validation[-1]
    best_step, best = min(validation[1:], key=lambda point: point[1])
    gain, fell = base - best, f"The validation loss {_moved(base, best)} to step {best_step}"
    if gain < MIN_GAIN * base:
        return _judge_without_gain(validation, training)
    if last - best >= LOST_GAIN * gain:
        evidence = f"{fell} and then {_moved(best, last)} to step {last_step}; that of the training images"
        evidence += f" {_moved(*_ends(training))} in all."
        if keep_best:
            return Finding("good", evidence, f"Look at images: step {best_step} was saved.")
        advice = f"Train again with --keep_best (here it would have saved step {best_step}), fewer steps, a lower"
        return Finding("overfit", evidence, f"{advice} --learning_rate, or more photos.")
    early_step, early = next(point for point in reversed(validation[:-1]) if point[0] <= 0.75 * last_step)
    if not early_step:
        advice = "Measure more often (--validation_loss_steps) to see whether it falls still."
        return Finding("unknown", f"{fell}; how, was not measured.", advice)
    late = f"from step {early_step} on it {_moved(early, last)}"
    if early - last >= LATE_GAIN * gain:
        return Finding("underfit", f"{fell}; still {late}.", _MORE)
    advice = "Look at images. If the subject is not like the photos, train more parameters."
    return Finding("good", f"{fell}; {late}, little of that.", advice)


def _judge_without_gain(validation: Curve, training: Curve) -> Finding:
    """Judge a validation loss that was never clearly below that of the base."""
    (first, last), (start, end) = _ends(validation), _ends(training)
    evidence = f"The validation loss was never more than {MIN_GAIN:.0%} below that of the base, and"
    evidence += f" {_moved(first, last)}; that of the training images {_moved(start, end)}."
    if last - first >= MIN_GAIN * first or start - end >= 10 * MIN_GAIN * start:
        return Finding("overfit", evidence, "A lower --learning_rate, fewer steps, or more photos.")
    return Finding("underfit", evidence, _MORE)


def _judge_training(training: Curve) -> Finding:
    """Judge a run without held-out images."""
    start, end = _ends(training)
    evidence = f"The loss on the training images {_moved(start, end)}"
    if end - start >= MIN_GAIN * start:
        return Finding("underfit", f"{evidence}.", "A lower --learning_rate.")
    if start - end < MIN_GAIN * start:
        return Finding("underfit", f"{evidence}.", _MORE)
    evidence += ", but only held-out photos can tell learning the subject from memorizing these photos."
    return Finding("unknown", evidence, f"To know more, {_HOLD_OUT}.")


def _forgets(line: Mapping[str, Any], preserved: bool) -> Finding:
    evidence = f"At step {line['step']}, predictions for prompts without the trigger word differ from the base's by "
    evidence += f"{line['base_drift']:.1%} of their mean square"
    if by_prompt := line.get("base_drift_by_prompt"):
        prompt, most = max(by_prompt.items(), key=lambda item: item[1])
        evidence += f", most for {prompt!r} ({most:.1%})"
    keep = "A higher --preservation_weight or --prior_loss_weight" if preserved else "--preservation class"
    return Finding("forgets the base", f"{evidence}.", f"{keep}, a lower --learning_rate, or fewer steps.")


def _ends(curve: Curve) -> tuple[float, float]:
    return curve[0][1], curve[-1][1]


def _moved(before: float, after: float) -> str:
    return f"{'rose' if after > before else 'fell'} by {abs(after / before - 1):.1%}"
