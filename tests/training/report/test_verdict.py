"""The verdict on hand-made curves: a test for each row of the table in `docs/training.md`, and its thresholds."""

import math
import re

import pytest

from atomdiff.training.report.verdict import LATE_GAIN, LOST_GAIN, MAX_DRIFT, MEMORIZED, MIN_GAIN, judge

STEPS = (0, 25, 50, 75, 100)
LEARNED = (1.0, 0.8, 0.7, 0.65, 0.6)
FALLEN = (1.0, 0.7, 0.6, 0.6, 0.6)
FLAT = (1.0, 1.0, 1.0, 1.0, 1.0)
RISEN = (1.0, 1.2, 1.5, 1.7, 2.0)


def lines(validation=None, training=LEARNED, drift=(0.0,) * 5, steps=STEPS):
    """Lines of a validation log."""
    values = [
        {"step": step, "training_images_loss": loss, "base_drift": drifted, "base_drift_by_prompt": {"": drifted}}
        for step, loss, drifted in zip(steps, training, drift, strict=False)
    ]
    if validation is not None:
        values = [line | {"validation_loss": loss} for line, loss in zip(values, validation, strict=True)]
    return values


def judge_one(*arguments, **options):
    (finding,) = judge(*arguments, **options)
    return finding


def verdicts(values, step=100, **options):
    return [finding.verdict for finding in judge(values, step, **options)]


@pytest.mark.parametrize(
    ("validation", "training", "expected"),
    [
        (RISEN, RISEN, "diverged"),
        (FLAT, RISEN, "diverged"),
        ((1, 0.8, 0.7, 0.9, 2), RISEN, "diverged"),
        (None, RISEN, "diverged"),
        (RISEN, LEARNED, "overfit"),
        (RISEN, FLAT, "overfit"),
        (FLAT, LEARNED, "overfit"),
        ((1, 0.7, 0.6, 0.7, 0.8), LEARNED, "overfit"),
        ((1, 0.9, 0.8, 0.7, 0.6), LEARNED, "underfit"),
        (FLAT, FLAT, "underfit"),
        (None, FLAT, "underfit"),
        (FALLEN, LEARNED, "good"),
        (FALLEN, RISEN, "good"),  # few photos: what it is for are others
        (None, LEARNED, "unknown"),
    ],
)
def test_what_the_curves_of_a_run_look_like(validation, training, expected):
    assert verdicts(lines(validation, training)) == [expected]


@pytest.mark.parametrize(
    ("validation", "expected"),
    [
        ((1, 0.7, 9.0, 0.6, 0.6), "good"),
        ((1, 0.7, 0.6, 9.0, 0.6), "good"),
        ((1, 9.0, 0.6, 0.6, 0.6), "good"),
        ((1, 0.7, 0.6, 0.6, 9.0), "overfit"),  # it may stay there
    ],
)
def test_spikes_on_the_way_do_not_count(validation, expected):
    assert verdicts(lines(validation)) == [expected]


@pytest.mark.parametrize(
    ("share", "expected"), [(LATE_GAIN - 0.01, "good"), (LATE_GAIN + 0.01, "underfit"), (0.4, "underfit")]
)
def test_a_loss_that_still_falls_in_the_last_quarter_is_underfit(share, expected):
    gain = 0.4
    finding = judge_one(lines((1, 0.9, 0.8, 0.6 + share * gain, 0.6)), 100)
    assert finding.verdict == expected
    assert f"fell by 40.0% to step 100; from step 75 on it fell by {share:.1%} of that;" in finding.evidence


@pytest.mark.parametrize(
    ("validation", "evidence"),
    [
        (
            (0.40, 0.34, 0.36, 0.352),
            "The validation loss fell by 15.0% to step 100; from step 100 on it rose by 20.0% of that; that of the "
            "training images fell by 68.4% in all.",
        ),
        (
            (0.40, 0.34, 0.345, 0.351),
            "The validation loss fell by 15.0% to step 100; from step 100 on it rose by 18.3% of that; that of the "
            "training images fell by 68.4% in all.",
        ),
    ],
)
def test_a_loss_that_ends_above_its_lowest_is_not_underfit(validation, evidence):
    finding = judge_one(lines(validation, (0.38, 0.30, 0.20, 0.12), steps=(0, 100, 200, 300)), 300)
    assert (finding.verdict, finding.evidence) == ("good", evidence)


@pytest.mark.parametrize(("share", "expected"), [(LOST_GAIN - 0.01, "good"), (LOST_GAIN + 0.01, "overfit")])
def test_a_loss_that_rises_again_is_overfit_unless_the_best_was_saved(share, expected):
    values = lines((1, 0.7, 0.6, 0.6, 0.6 + share * 0.4))
    assert verdicts(values) == [expected]
    assert verdicts(values, step=50) == ["good"]
    finding = judge_one(values, 100)
    assert ("step 50" in finding.evidence) and ("--keep_best" in finding.advice) == (expected == "overfit")


def test_the_evidence_has_the_shares_that_decide():
    assert judge_one(lines((2.0, 1.5, 1.0, 1.2, 1.5)), 100).evidence == (
        "The validation loss fell by 50.0% to step 50; from step 50 on it rose by 50.0% of that; that of the training "
        "images fell by 40.0% in all."
    )


def test_the_best_that_was_saved_may_be_the_first_that_was_measured():
    values = lines((0.40, 0.395, 0.45, 0.60), (0.40, 0.35, 0.2, 0.1), steps=(0, 100, 200, 300))
    finding = judge_one(values, 100)
    assert (
        finding.verdict == "overfit" and "Step 100, which was saved, is the first that was measured" in finding.evidence
    )
    assert finding.advice == "A lower --learning_rate, or measure more often (--validation_loss_steps)."


def test_the_best_that_was_saved_may_be_worse_than_the_base():
    values = lines((0.40, 0.41, 0.45, 0.60), (0.40, 0.35, 0.2, 0.1), steps=(0, 100, 200, 300))
    finding = judge_one(values, 100)
    assert (
        finding.verdict == "overfit"
        and "rose by 50.0%, and rose by 2.5% to step 100, which was saved;" in finding.evidence
    )


@pytest.mark.parametrize(
    ("validation", "training", "expected"),
    [
        ((1, 1, 1, 1, 1 - 0.9 * MIN_GAIN), (1, 1, 1, 1, 0.95), "underfit"),
        ((1, 1, 1, 1, 1 + 0.9 * MIN_GAIN), FLAT, "underfit"),
        ((1, 1, 1, 1, 1 + 1.1 * MIN_GAIN), (1, 1, 1, 1, 0.95), "overfit"),
        ((1, 1, 1, 1, 1 + 1.1 * MIN_GAIN), (1, 1, 1, 1, 1 + 1.1 * MIN_GAIN), "diverged"),
        (FLAT, (1, 1, 1, 1, 1 - 1.1 * MEMORIZED), "overfit"),
        (FLAT, (1, 1, 1, 1, 1 - 0.9 * MEMORIZED), "underfit"),
        ((1, 1, 1, 1, 1 - 1.1 * MIN_GAIN), (1, 1, 1, 1, 0.95), "underfit"),  # as all of it came at the end
        ((1, 1 - 1.1 * MIN_GAIN, *[1 - 1.1 * MIN_GAIN] * 3), (1, 1, 1, 1, 0.95), "good"),
    ],
)
def test_a_loss_that_stays_at_that_of_the_base(validation, training, expected):
    assert verdicts(lines(validation, training)) == [expected]


@pytest.mark.parametrize("validation", [(0.4, 0.9, 5, 12, 16.85), None])
def test_a_run_that_its_learning_rate_destroyed_asks_for_a_lower_one_alone(validation):
    finding = judge_one(lines(validation, (0.4, 0.9, 5, 12, 17.26)), 100)
    assert finding.verdict == "diverged" and finding.advice == "A lower --learning_rate."
    assert "rose by 4215.0%" in finding.evidence and ("rose by 4112.5%" in finding.evidence) == (validation is not None)
    slow = judge_one(lines(validation and FLAT, FLAT), 100)
    assert slow.verdict == "underfit" and "a higher --learning_rate" in slow.advice


@pytest.mark.parametrize(("drift", "forgets"), [(MAX_DRIFT * 0.99, False), (MAX_DRIFT, True)])
def test_drift_of_the_saved_step_counts(drift, forgets):
    values = lines(FALLEN, drift=(0, 0, 0, 0, drift))
    assert verdicts(values) == ["good", *["forgets the base"] * forgets]
    assert verdicts(values, step=50) == ["good"]
    if forgets:
        assert "--preservation class" in judge(values, 100)[1].advice
        assert "--preservation_weight" in judge(values, 100, preserved=True)[1].advice
        assert "10.0% of their mean square, most for ''" in judge(values, 100)[1].evidence


@pytest.mark.parametrize(
    ("validation", "training", "preserved"),
    [
        ((1, 0.9, 0.8, 0.7, 0.6), LEARNED, False),
        ((1, 0.9, 0.8, 0.7, 0.6), LEARNED, True),
        (FLAT, FLAT, False),
        (None, FLAT, False),
        (RISEN, RISEN, False),
        (FALLEN, LEARNED, False),
        (RISEN, LEARNED, True),
    ],
)
def test_advice_on_fit_and_drift_is_not_opposite(validation, training, preserved):
    findings = judge(lines(validation, training, drift=(0, 0, 0, 0, 0.5)), 100, preserved=preserved)
    assert len(findings) == 2
    advice = " ".join(finding.advice.lower() for finding in findings)
    assert not ("more steps" in advice and "fewer steps" in advice)
    assert not ("higher --learning_rate" in advice and "lower --learning_rate" in advice)
    if findings[0].verdict == "underfit":
        assert re.match("First keep the base, as below; then more steps", findings[0].advice)
        assert "target_modules" in findings[1].advice


@pytest.mark.parametrize("change", [{}, {"base_drift": math.nan}])
def test_an_unknown_drift_says_nothing(change):
    values = [{name: value for name, value in line.items() if "drift" not in name} | change for line in lines(FALLEN)]
    assert verdicts(values) == ["good"]


def test_without_held_out_photos_it_says_what_cannot_be_known():
    finding = judge_one(lines(), 100)
    assert finding.verdict == "unknown" and "--validation_split" in finding.advice


def test_a_drift_needs_no_held_out_photos():
    assert verdicts(lines(drift=(0, 0, 0, 0, 0.5))) == ["unknown", "forgets the base"]


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ([], "step 0 and step 100"),
        (lines(FALLEN)[:1], "step 100"),
        (lines(FALLEN)[2:], "step 0"),
        (lines(FALLEN)[:-1], "step 100"),
        ([*lines()[:2], *lines(FALLEN)[2:]], "step 0"),
        (lines((math.nan, *FALLEN[1:])), "step 0"),
        (lines((*FALLEN[:-1], math.inf)), "step 100"),
        (lines(FALLEN, (*LEARNED[:-1], math.nan)), "step 100"),
        (lines(None, (math.nan,) * 5), "step 0 and step 100"),
    ],
)
def test_without_base_and_saved_step_there_is_no_verdict(values, missing):
    finding = judge_one(values, 100)
    assert finding.verdict == "unknown" and f"no finite loss of {missing};" in finding.evidence


def test_what_is_not_finite_on_the_way_is_left_out():
    assert verdicts(lines((1, 0.7, math.nan, 0.6, 0.6), (1, math.inf, 0.7, 0.65, 0.6))) == ["good"]


def test_two_measurements_tell_of_a_gain_but_not_of_its_end():
    finding = judge_one([*lines(FALLEN)[:1], *lines(FALLEN)[-1:]], 100)
    assert finding.verdict == "unknown" and "--validation_loss_steps" in finding.advice
