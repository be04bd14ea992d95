"""The verdict on a training run: how well it fits, and whether it forgets the base. It is made of measurements alone.

The rules are those of the table in `docs/training.md`, in the same order; the first that holds is the verdict on the
fit. Changes of a loss are shares of the base's loss, and what came of a fall later is a share of that fall, so that the
thresholds mean the same for every base and prediction type. They say when to look closer: images decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

MIN_GAIN = 0.01
"""A loss has fallen, or risen, if it changed by so much of the base's loss, or more."""
MEMORIZED = 0.1
"""Overfit if only the loss on the training images fell, by so much of the base's loss, or more."""
LATE_GAIN = 0.1
"""Underfit if so much of the whole fall of the validation loss came in the last quarter of the steps, or more."""
LOST_GAIN = 0.25
"""Overfit if the validation loss then rose again by so much of its whole fall, or more."""
MAX_DRIFT = 0.1
"""Forgets the base if predictions for other prompts changed by so much of their mean square, or more."""

_LOSSES = ("validation_loss", "training_images_loss")
_LOWER = "A lower --learning_rate."
_MORE = "More steps, or a higher --learning_rate."
_HOLD_OUT = "hold some photos out with --validation_split 0.2, or name more of them with --validation_data_dir"
_MEASURE = "Set --validation_loss_steps, and train from the first step; if that was so, see the warnings of the run."

Curve = Sequence[tuple[int, float]]
"""Steps and losses at fixed noise, the base's at step 0 first."""


@dataclass(frozen=True)
class Finding:
    """A part of the verdict."""

    verdict: Literal["underfit", "good", "overfit", "forgets the base", "unknown", "diverged"]
    evidence: str
    """Figures that it rests on."""
    advice: str
    """What to try next."""


def judge(measurements: Sequence[Mapping[str, Any]], saved_step: int, *, preserved: bool = False) -> list[Finding]:
    """Return what the measurements of a run say: about the fit first, then, if it is so, that it forgets the base.

    Args:
        measurements: Lines of the validation log, in the order of their steps.
        saved_step: The step whose parameters were saved: the last, or with `keep_best` that of the lowest validation
            loss.
        preserved: Whether the run kept the base by output or prior preservation.
    """
    finite = [line for line in measurements if all(math.isfinite(line[name]) for name in _LOSSES if name in line)]
    validation, training = ([(line["step"], line[name]) for line in finite if name in line] for name in _LOSSES)
    fit = _judge_fit(validation, training, saved_step)
    saved = next((line for line in measurements if line["step"] == saved_step), {})
    if not saved.get("base_drift", 0.0) >= MAX_DRIFT:
        return [fit]
    forgets = _forgets(saved, fit, preserved)
    if fit.verdict == "underfit":  # more steps alone would forget more
        fit = replace(fit, advice="First keep the base, as below; then more steps.")
    return [fit, forgets]


def _judge_fit(validation: Curve, training: Curve, saved_step: int) -> Finding:
    curve = validation or training
    measured = [step for step, _ in curve]
    if missing := [f"step {step}" for step in (0, saved_step) if step not in measured]:
        found = f"There is no finite loss of {' and '.join(missing)}; a verdict compares steps 0 and {saved_step}."
        return Finding("unknown", found, _MEASURE)
    if _change(training) >= MIN_GAIN and _change(curve) > -MIN_GAIN:
        return Finding("diverged", _describe_changes(validation, training, saved_step), _LOWER)
    return _judge_validation(validation, training, saved_step) if validation else _judge_training(training)


def _judge_validation(validation: Curve, training: Curve, saved_step: int) -> Finding:
    """Judge the loss on held-out images by its lowest point, and by what came of that fall later."""
    (_, base), (first_step, _), (last_step, last) = validation[0], validation[1], validation[-1]
    best_step, best = min(validation[1:], key=lambda point: point[1])
    fall = base - best
    if fall < MIN_GAIN * base:
        return _judge_without_gain(validation, training, saved_step)

    def evidence(step: int, loss: float) -> str:
        later = f"from step {step} on it {_moved((last - loss) / fall)} of that"
        whole = f"The validation loss {_moved(best / base - 1)} to step {best_step}; {later}"
        return f"{whole}; that of the training images {_moved(_change(training))} in all."

    if last - best >= LOST_GAIN * fall:
        return _judge_rise(evidence(best_step, best), best_step, first_step, saved_step < last_step)
    early = [point for point in validation if point[0] <= 0.75 * last_step]
    if len(early) < 2:
        advice = "Measure more often (--validation_loss_steps) to see whether it falls still."
        return Finding("unknown", f"{evidence(*early[0])} How it fell in between was not measured.", advice)
    early_step, early_best = min(early, key=lambda point: point[1])
    if early_best - last >= LATE_GAIN * fall:
        return Finding("underfit", evidence(early_step, early_best), _MORE)
    advice = "Look at images. If the subject is not like the photos, train more parameters."
    return Finding("good", evidence(early_step, early_best), advice)


def _judge_rise(evidence: str, best_step: int, first_step: int, best_saved: bool) -> Finding:
    """Judge a validation loss that fell and rose again."""
    if not best_saved:
        advice = f"Train again with --keep_best (here it would have saved step {best_step}), fewer steps, a lower"
        return Finding("overfit", evidence, f"{advice} --learning_rate, or more photos.")
    if best_step == first_step:
        evidence += (
            f" Step {best_step}, which was saved, is the first that was measured: a better one may lie beside it."
        )
        advice = "A lower --learning_rate, or measure more often (--validation_loss_steps)."
        return Finding("overfit", evidence, advice)
    return Finding("good", evidence, f"Look at images: step {best_step} was saved.")


def _judge_without_gain(validation: Curve, training: Curve, saved_step: int) -> Finding:
    """Judge a validation loss that was never clearly below that of the base."""
    evidence = f"The validation loss was never {MIN_GAIN:.0%} or more below that of the base. "
    evidence += _describe_changes(validation, training, saved_step)
    if _change(validation) >= MIN_GAIN or _change(training) <= -MEMORIZED:
        return Finding("overfit", evidence, "A lower --learning_rate, fewer steps, or more photos.")
    return Finding("underfit", evidence, _MORE)


def _judge_training(training: Curve) -> Finding:
    """Judge a run without held-out images."""
    evidence = f"The loss on the training images {_moved(_change(training))}"
    if _change(training) > -MIN_GAIN:
        return Finding("underfit", f"{evidence}.", _MORE)
    evidence += ", but only held-out photos can tell learning the subject from memorizing these photos."
    return Finding("unknown", evidence, f"To know more, {_HOLD_OUT}.")


def _forgets(saved: Mapping[str, Any], fit: Finding, preserved: bool) -> Finding:
    """Return what the drift of the saved step says, with advice that agrees with that on the fit."""
    evidence = f"At step {saved['step']}, predictions for prompts without the trigger word differ from the base's by "
    evidence += f"{saved['base_drift']:.1%} of their mean square"
    if by_prompt := saved.get("base_drift_by_prompt"):
        prompt, most = max(by_prompt.items(), key=lambda item: item[1])
        evidence += f", most for {prompt!r} ({most:.1%})"
    keep = "A higher --preservation_weight or --prior_loss_weight" if preserved else "--preservation class"
    advice = {
        "diverged": _LOWER,
        "underfit": f"{keep}, or fewer or other layers (target_modules in the adapter's JSON file).",
    }
    usual = f"{keep}, a lower --learning_rate, or fewer steps."
    return Finding("forgets the base", f"{evidence}.", advice.get(fit.verdict, usual))


def _describe_changes(validation: Curve, training: Curve, saved_step: int) -> str:
    """Say how far the losses of the last step are from those of the base, and that of the saved step, if another."""
    if not validation:
        return f"The loss on the training images {_moved(_change(training))}."
    text = f"The validation loss {_moved(_change(validation))}"
    if saved_step < validation[-1][0]:
        saved = dict(validation)[saved_step]
        text += f", and {_moved(saved / validation[0][1] - 1)} to step {saved_step}, which was saved"
    return f"{text}; that of the training images {_moved(_change(training))}."


def _change(curve: Curve) -> float:
    """Return how far the last loss is above the base's, as a share of that."""
    return curve[-1][1] / curve[0][1] - 1


def _moved(share: float) -> str:
    return f"{'rose' if share > 0 else 'fell'} by {abs(share):.1%}"
