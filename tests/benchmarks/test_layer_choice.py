"""Learned layers beside layers by hand, in miniature, and what two choices have in common."""

import json
from pathlib import Path

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.toybox.world import FAMILY_NAMES, HARD, HELD_OUT_FAMILIES, SUBJECTS
from atomdiff.toybox.world.held_out import color_is_held_out
from atomdiff.utils.errors import UserError
from benchmarks import layer_choice
from benchmarks.layer_choice import BY_HAND, LEARNED, Chosen, LayerChoiceConfig, chance_overlap, overlap, overlaps


@pytest.fixture
def config(world):
    path = world.path
    return LayerChoiceConfig(
        pattern_heavy=("robot",),
        color_heavy=("mug",),
        budgets=("6KB", "13KB"),
        run=str(path / "run.yaml"),
        protocols=(str(path / "places.yaml"), str(path / "edits.yaml")),
        subjects_dir=str(path / "subjects"),
        work_dir=str(path / "work"),
        output=str(path / "layers.json"),
    )


@pytest.mark.slow
def test_learned_layers_are_compared_with_layers_by_hand(config, world):
    layer_choice.main(config)
    result = json.loads(Path(config.output).read_text())
    assert result["kinds"] == {"pattern-heavy": ["robot"], "color-heavy": ["mug"]}
    runs = {(run["subject"], run["way"], run["budget"]): run for run in result["runs"]}
    assert len(runs) == len(world.started) == 8
    concepts = [read_concept_file(file) for file in world.path.rglob("*.atoms.safetensors")]
    found = sorted(sorted(concept.layers) for concept in concepts)
    assert found == sorted(run["names"] for run in runs.values())
    for (subject, way, budget), run in runs.items():
        assert run["layers"] == len(run["names"]) and run["kind"] == (
            "color-heavy" if subject == "mug" else "pattern-heavy"
        )
        counted = sum(int(block.split()[-1]) for block in run["blocks"].split(", "))
        assert counted == run["layers"] and run["names"][0].startswith("unet.")
        if way == LEARNED:
            assert run["bytes"] <= int(budget.removesuffix("KB")) * 1000
    learned = [runs["mug", LEARNED, budget]["layers"] for budget in config.budgets]
    assert 0 < learned[0] < learned[1]
    figures = result["figures"]["13KB"]
    mug, robot = (runs[name, LEARNED, "13KB"]["gain"] for name in ("mug", "robot"))
    assert figures[LEARNED]["all"]["gain"]["mean"] == pytest.approx((mug + robot) / 2, abs=1e-4)
    assert figures[LEARNED]["color-heavy"]["gain"]["mean"] == pytest.approx(mug, abs=1e-4)
    more = [runs[name, LEARNED, "13KB"]["drift"] - runs[name, BY_HAND, "13KB"]["drift"] for name in ("mug", "robot")]
    assert figures["difference"]["drift"]["mean"] == pytest.approx(sum(more) / 2, abs=1e-4)
    assert figures["overlap"].keys() == {"different kinds", "by chance", "with by hand"}
    layer_choice.main(config)  # finished runs are not repeated
    assert len(world.started) == 8


def test_each_run_has_a_folder_of_its_own_and_the_budget_or_the_layers(config):
    trials = {
        (way, budget): layer_choice.trial_of(config, "mug", 0, way, budget)
        for way in (LEARNED, BY_HAND)
        for budget in layer_choice.TARGETS
    }
    assert len({trial.folder for trial in trials.values()}) == len(trials)
    for (way, budget), trial in trials.items():
        assert trial.adapter.get("select_budget") == (budget if way == LEARNED else None)
        assert trial.options["learning_rate"] == (5e-3 if way == LEARNED else 1.4e-3)
        if way == BY_HAND:
            assert trial.adapter["target_modules"] == layer_choice.TARGETS[budget]
    assert trials[BY_HAND, "8KB"].folder.endswith("atoms/tiny/0.0014/subjects-mug-seed0")  # that of the comparison


def test_the_subjects_are_what_their_kinds_say():
    usual = LayerChoiceConfig(output="")
    by_class = {name.split()[-1]: (name, subject) for name, subject in SUBJECTS.items()}
    for kind, subjects in usual.kinds.items():
        for name, subject in (by_class[each] for each in subjects):
            of_family = FAMILY_NAMES[int(subject.family)] in HELD_OUT_FAMILIES
            assert of_family == (name in HARD) == (kind == "pattern-heavy")
            assert bool(color_is_held_out(subject.colors).any()) == (kind == "color-heavy")


def chosen(kind, subject, way, *layers, seed=0):
    return Chosen(kind, subject, seed, way, "8KB", frozenset(layers), 8, {})


def test_overlaps_by_kind_and_by_chance():
    assert overlap(frozenset("ab"), frozenset("bcd")) == 1 / 4
    assert chance_overlap(4, 4, 8) == 2 / 6 and chance_overlap(8, 8, 8) == 1
    runs = [
        chosen("p", "mushroom", LEARNED, "a", "b"),
        chosen("p", "mushroom", LEARNED, "a", "b", seed=1),
        chosen("p", "umbrella", LEARNED, "b", "c"),
        chosen("c", "mug", LEARNED, "d", "e"),
        *(chosen("p", name, BY_HAND, "a", "b") for name in ("mushroom", "umbrella", "mug")),
    ]
    by_chance = round(0.5 / 3.5, 4)
    expected = {"same subject": 1.0, "same kind": 0.3333, "different kinds": 0.0, "by chance": by_chance}
    assert overlaps(runs) == {**expected, "with by hand": round((1 + 1 + 1 / 3) / 4, 4)}


def test_a_budget_without_layers_by_hand_is_refused(config):
    with pytest.raises(UserError, match=r"budgets: found '7KB'; expected some of 6KB, 8KB, 13KB, for which TARGETS"):
        layer_choice.check(layer_choice.LayerChoiceConfig(budgets=("7KB",)))
