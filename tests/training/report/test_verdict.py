"""The verdict on hand-made curves, at the borders of its thresholds."""

import pytest

from atomdiff.training.report.verdict import LATE_GAIN, LOST_GAIN, MAX_DRIFT, MIN_GAIN, judge

STEPS = (0, 25, 50, 75, 100)
LEARNED = (1.0, 0.8, 0.7, 0.65, 0.6)
FLAT = (1.0, 0.7, 0.6, 0.6, 0.6)


def lines(validation=None, training=LEARNED, drift=(0.0,) * 5, steps=STEPS):
    """Lines of a validation log."""
    values = [
        {"step": step, "training_images_loss": loss, "base_drift": drifted, "base_drift_by_prompt": {"": drifted}}
        for step, loss, drifted in zip(steps, training, drift, strict=True)
    ]
    if validation is not None:
        values = [line | {"validation_loss": loss} for line, loss in zip(values, validation, strict=True)]
    return values


def verdicts(values, step=100, **options):
    return [finding.verdict for finding in judge(values, step, **options)]


@pytest.mark.parametrize(
    ("share", "expected"), [(LATE_GAIN - 0.01, "good"), (LATE_GAIN + 0.01, "underfit"), (1.0, "underfit")]
)
def test_a_loss_that_still_falls_in_the_last_quarter_is_underfit(share, expected):
    gain = 0.4
    assert verdicts(lines((1, 0.9, 0.8, 0.6 + share * gain, 0.6))) == [expected]


@pytest.mark.parametrize(("share", "expected"), [(LOST_GAIN - 0.01, "good"), (LOST_GAIN + 0.01, "overfit")])
def test_a_loss_that_rises_again_is_overfit_unless_the_best_was_saved(share, expected):
    values = lines((1, 0.7, 0.6, 0.6, 0.6 + share * 0.4))
    assert verdicts(values) == [expected]
    assert verdicts(values, step=50, keep_best=True) == ["good"]
    (finding,) = judge(values, 100)
    assert ("step 50" in finding.evidence) and ("--keep_best" in finding.advice) == (expected == "overfit")


def test_the_evidence_has_the_figures():
    (finding,) = judge(lines((2.0, 1.5, 1.0, 1.2, 1.5)), 100)
    assert finding.evidence == (
        "The validation loss fell by 50.0% to step 50 and then rose by 50.0% to step 100; that of the training images "
        "fell by 40.0% in all."
    )


@pytest.mark.parametrize(
    ("validation", "training", "expected"),
    [
        ((1, 1, 1, 1, 1 - 0.9 * MIN_GAIN), (1, 1, 1, 1, 0.95), "underfit"),
        ((1, 1, 1, 1, 1 + 0.9 * MIN_GAIN), (1, 1, 1, 1, 1.0), "underfit"),
        ((1, 1, 1, 1, 1 + 1.1 * MIN_GAIN), (1, 1, 1, 1, 0.95), "overfit"),
        ((1, 1, 1, 1, 1), (1, 0.9, 0.8, 0.8, 0.8), "overfit"),
        ((1, 1, 1, 1, 1 - 1.1 * MIN_GAIN), (1, 1, 1, 1, 0.95), "underfit"),  # as all of it came at the end
        ((1, 1 - 1.1 * MIN_GAIN, *[1 - 1.1 * MIN_GAIN] * 3), (1, 1, 1, 1, 0.95), "good"),
    ],
)
def test_a_loss_that_stays_at_that_of_the_base(validation, training, expected):
    assert verdicts(lines(validation, training)) == [expected]


@pytest.mark.parametrize(("drift", "forgets"), [(MAX_DRIFT * 0.99, False), (MAX_DRIFT, True)])
def test_drift_of_the_saved_step_counts(drift, forgets):
    values = lines(FLAT, drift=(0, 0, 0, 0, drift))
    assert verdicts(values) == ["good", *["forgets the base"] * forgets]
    assert verdicts(values, step=50, keep_best=True) == ["good"]
    if forgets:
        assert "--preservation class" in judge(values, 100)[1].advice
        assert "--preservation_weight" in judge(values, 100, preserved=True)[1].advice
        assert "10.0% of their mean square, most for ''" in judge(values, 100)[1].evidence


@pytest.mark.parametrize(
    ("training", "expected"), [(LEARNED, "unknown"), ((1, 1, 1, 1, 1 - 0.9 * MIN_GAIN), "underfit")]
)
def test_without_held_out_photos_it_says_what_cannot_be_known(training, expected):
    values = lines(training=training)
    assert verdicts(values) == [expected]
    (finding,) = judge(values, 100)
    assert ("--validation_split" in finding.advice) == (expected == "unknown")


def test_a_loss_that_rises_on_the_training_images_too_asks_for_a_lower_rate():
    (slow,), (fast,) = (judge(lines(training=(1, 1, 1, 1, last)), 100) for last in (1.0, 1 + 1.1 * MIN_GAIN))
    assert slow.verdict == fast.verdict == "underfit"
    assert "a higher --learning_rate" in slow.advice and fast.advice == "A lower --learning_rate."


def test_a_drift_needs_no_held_out_photos():
    assert verdicts(lines(drift=(0, 0, 0, 0, 0.5))) == ["unknown", "forgets the base"]


@pytest.mark.parametrize(
    "values",
    [[], lines(FLAT)[:1], lines(FLAT)[2:], [*lines()[:2], *lines(FLAT)[2:]]],
    ids=["none", "the base alone", "not from the start", "held-out images from the middle on"],
)
def test_too_few_measurements_are_no_verdict(values):
    assert verdicts(values) == ["unknown"]


def test_two_measurements_tell_of_a_gain_but_not_of_its_end():
    (finding,) = judge([*lines(FLAT)[:1], *lines(FLAT)[-1:]], 100)
    assert finding.verdict == "unknown" and "--validation_loss_steps" in finding.advice
