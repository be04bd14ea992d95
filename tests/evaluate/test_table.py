import math

from atomdiff.evaluate.estimate import Estimate
from atomdiff.evaluate.table import markdown_table, means_of_kinds


def measured(value):
    return {"dino": {"similarity": {"base": Estimate(value, 0.1, 4), "real": 0.5}, "vendi": None}}


SUBJECTS = {"cat": measured(0.1), "mug": measured(0.4), "vase": measured(0.7)}


def test_means_are_over_subjects_and_those_of_each_kind():
    means = means_of_kinds(SUBJECTS, {"cat": "living", "mug": "object", "vase": "object"})
    assert list(means) == ["all", "living", "object"]
    overall = means["all"]["dino"]["similarity"]["base"]
    assert math.isclose(overall.mean, 0.4) and math.isclose(overall.standard_error, 0.3 / math.sqrt(3))
    assert means["living"]["dino"] == measured(0.1)["dino"]  # one subject has its own error
    assert math.isclose(means["object"]["dino"]["similarity"]["base"].mean, 0.55)
    assert list(means_of_kinds(SUBJECTS, dict.fromkeys(SUBJECTS, "any"))) == ["all"]


def test_a_table_has_a_row_for_each_subject_and_no_empty_column():
    means = means_of_kinds(SUBJECTS, dict.fromkeys(SUBJECTS, "any"))
    lines = markdown_table(SUBJECTS, means, "dino").splitlines()
    assert lines[0] == "| subject | similarity: base | similarity: real |"
    assert lines[2] == "| cat | 0.100 ± 0.100 | 0.500 |"
    assert lines[-1] == "| **mean of all** | 0.400 ± 0.173 | 0.500 ± 0.000 |"


def test_one_subject_has_no_mean():
    one = {"cat": measured(0.1)}
    assert len(markdown_table(one, means_of_kinds(one, {"cat": "any"}), "dino").splitlines()) == 3


def test_what_a_subject_lacks_is_the_mean_of_the_others():
    without = {"dino": {"similarity": {"base": Estimate(0.3, None, 1), "real": None}, "vendi": None}}
    means = means_of_kinds({**SUBJECTS, "dog": without}, dict.fromkeys([*SUBJECTS, "dog"], "any"))
    assert means["all"]["dino"]["similarity"]["real"] == Estimate(0.5, 0.0, 3)
