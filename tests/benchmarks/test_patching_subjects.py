"""Concepts beside full copies of the weights, in miniature."""

import json

import pytest
import torch

from atomdiff.utils.errors import UserError
from benchmarks import patching_subjects
from benchmarks.interpolation import interpolate, similarity_at
from benchmarks.loaded_concepts import same_tensors
from benchmarks.patching_subjects import PatchingConfig, curve_figures, figures_of_runs


def make_config(world, **changes):
    path = world.path
    return PatchingConfig(
        **{
            "patches": "atoms/tiny",
            "subjects": ("mug", "robot"),
            "weights": (0.5, 1.0),
            "alphas": (0.0, 0.5, 1.0),
            "repeats": 1,
            "run": str(path / "run.yaml"),
            "protocols": (str(path / "places.yaml"), str(path / "edits.yaml")),
            "subjects_dir": str(path / "subjects"),
            "results": str(path / "results"),
            "work_dir": str(path / "work"),
            "output": str(path / "patching.json"),
        }
        | changes
    )


@pytest.mark.slow
def test_concepts_and_copies_of_many_subjects(world):
    path = world.path
    (path / "results").mkdir()
    for method, rate in (("atoms-tiny", 0.5), ("full-default", 0.02)):
        (path / "results" / f"{method}.json").write_text(json.dumps({"figures": {"learning_rate": rate}}))
    patching_subjects.main(make_config(world))
    result = json.loads((path / "patching.json").read_text())
    figures = result["figures"]
    assert figures["images_equal_to_those_alone"] is True
    assert figures["base_equal_switched_off"] is True and figures["base_equal_unloaded"] is True
    assert figures["copies:bytes"] > figures["copies:tensor_bytes"] > figures["patches:bytes"]
    assert 0 < figures["bytes_share"] < 0.1 and 0 < figures["tensor_bytes_share"] < 0.1
    for name in ("switch", "copy_weights", "load_concept", "read_copy"):
        assert 0 < figures[f"{name}_seconds"] < 10
    own, ends = figures["by subject"], {"patches": 1.0, "copies": 1.0}
    for point in result["points"]:
        run = own[point["what"]][point["subject"]]
        if point["weight"] == ends[point["what"]]:  # the same images as in the run's own evaluation
            assert {name: point[name] for name in ("similarity", "drift")} == pytest.approx(
                {name: run[name] for name in ("similarity", "drift")}, abs=5e-4
            )
        else:
            assert point["drift"] < run["drift"]
    assert figures["copies:0"]["drift"]["mean"] == 0 < figures["copies:0.5"]["drift"]["mean"]
    assert figures["patches:1"]["similarity"]["count"] == 2 and len(result["points"]) == 2 * (2 + 3)

    patching_subjects.main(make_config(world))
    assert len(world.started) == 4


def test_methods_are_what_they_are_compared_as(world):
    with pytest.raises(UserError, match="^copies: atoms/tiny saves concepts, as atoms/default; give a method that"):
        patching_subjects.main(make_config(world, copies="atoms/tiny"))
    with pytest.raises(UserError, match="^patches: full/default saves whole pipelines, as full/default; give a"):
        patching_subjects.main(make_config(world, patches="full/default"))
    assert not world.started


def test_interpolated_weights_meet_both_ends_to_the_bit():
    start = {"weight": torch.randn(50), "steps": torch.tensor(3), "lost": torch.ones(1)}
    end = {"weight": torch.randn(50) * 1e-3, "steps": torch.tensor(9), "lost": torch.ones(1), "more": torch.ones(1)}
    found = {alpha: interpolate(start, end, alpha) for alpha in (0.0, 0.25, 1.0)}
    assert torch.equal(found[0.0]["weight"], start["weight"]) and torch.equal(found[1.0]["weight"], end["weight"])
    torch.testing.assert_close(found[0.25]["weight"], 0.75 * start["weight"] + 0.25 * end["weight"])
    assert all(each["steps"] == 3 and each.keys() == start.keys() for each in found.values())


def test_tensors_are_compared_to_the_bit_but_for_further_rows():
    before = {"table": torch.arange(6.0).view(3, 2), "count": torch.tensor(3)}
    longer = before | {"table": torch.cat([before["table"], torch.ones(1, 2)])}
    assert same_tensors(before, before, False) and same_tensors(longer, before, True)
    assert not same_tensors(longer, before, False)
    changed = before | {"table": before["table"] + torch.tensor([0.0, 1e-6])}
    assert not same_tensors(changed, before, True) and not same_tensors({}, before, True)


def test_copies_are_compared_where_they_drift_as_much():
    curve = [{"drift": drift, "similarity": drift / 2} for drift in (0.0, 0.1, 0.3)]
    assert similarity_at(curve, 0.2) == pytest.approx(0.1) and similarity_at(curve, 0.0) == 0
    assert similarity_at(curve, 0.31) is None
    points = {
        "patches": {s: {1.0: {"similarity": 0.9, "drift": drift}} for s, drift in (("mug", 0.1), ("cat", 0.3))},
        "copies": {s: dict(zip((0.0, 0.5, 1.0), curve, strict=True)) for s in ("mug", "cat")},
    }
    figures = curve_figures(points)
    assert figures["copies at the drift of patches:1"] == pytest.approx(0.1)
    assert figures["patches:1"]["drift"]["mean"] == 0.2 and figures["copies:0.5"]["similarity"]["mean"] == 0.05


def test_patches_are_compared_with_copies_in_pairs_of_a_subject(monkeypatch):
    monkeypatch.setattr(
        patching_subjects, "trial_figures", lambda gain: dict.fromkeys(patching_subjects.FROM_RUNS, gain)
    )
    found = figures_of_runs({"patches": {"mug": 0.5, "cat": 0.9}, "copies": {"mug": 0.4, "cat": 0.8}})
    assert found["patches over copies"]["gain"] == {"mean": 0.1, "standard_error": 0.0, "count": 2, "median": 0.1}
    assert found["copies"]["gain"]["mean"] == 0.6 and found["by subject"]["patches"]["cat"]["gain"] == 0.9
