"""Which images the tab *Try* asks for, and what stands in its prompt."""

import pytest

from atomdiff.serving.image_request import ImageRequest
from atomdiff.ui.comparison import (
    BEFORE_AFTER,
    CHECKPOINTS,
    SEEDS,
    WEIGHTS,
    add_phrase,
    checkpoint_prompts,
    choose_concepts,
    consecutive_seeds,
    plan,
)
from atomdiff.utils.errors import UserError


def asked(prompt, mode, seeds, variants=None):
    """Label -> prompt and seed."""
    planned = plan(ImageRequest(prompt, guidance_scale=3.0), mode, seeds, variants)
    assert all(request.guidance_scale == 3.0 for request in planned.requests.values())
    return {label: (request.prompt, request.seed) for label, request in planned.requests.items()}


def test_several_seeds():
    prompt = "a mug <atoms:mug:0.5>"
    assert asked(prompt, SEEDS, range(3, 5)) == {f"seed {seed}": (prompt, seed) for seed in (3, 4)}


def test_before_and_after_have_the_same_seed():
    prompt = 'a mug <atoms:mug:{"blocks": {"down": 0.5}}>'
    assert list(asked(prompt, BEFORE_AFTER, range(2)).values()) == [
        ("a mug", 0),
        (prompt, 0),
        ("a mug", 1),
        (prompt, 1),
    ]


def test_weights_rise_in_a_row_of_one_seed():
    found = asked('a mug <atoms:mug:{"weight": 0.8, "blocks": {"up": 0.5}}> <atoms:cat:0.4>', WEIGHTS, [7])
    assert found["seed 7, weight x 0.5"] == (
        'a mug <atoms:mug:{"weight": 0.4, "blocks": {"up": 0.5}}> <atoms:cat:0.2>',
        7,
    )
    assert {seed for _, seed in found.values()} == {7} and len(found) == 6


def test_checkpoints_take_the_weight_of_the_concept_that_they_became():
    names = {"step 1": "mug-step-1", "step 2": "mug"}
    prompts = checkpoint_prompts("a mug <atoms:mug:0.8> <atoms:cat:0.4>", "mug", names)
    assert prompts == {
        "step 1": "a mug <atoms:cat:0.4> <atoms:mug-step-1:0.8>",
        "step 2": "a mug <atoms:cat:0.4> <atoms:mug:0.8>",
    }
    assert checkpoint_prompts("a mug", "mug", names)["step 1"] == "a mug <atoms:mug-step-1:1>"
    found = asked("a mug", CHECKPOINTS, [5, 6], prompts)
    assert list(found) == ["seed 5, step 1", "seed 5, step 2", "seed 6, step 1", "seed 6, step 2"]
    assert found["seed 6, step 2"] == (prompts["step 2"], 6)


@pytest.mark.parametrize(
    ("prompt", "mode", "message"),
    [
        (" ", SEEDS, "no prompt"),
        ("<atoms:mug>", SEEDS, "no prompt"),
        ("a mug", BEFORE_AFTER, "no concept to compare"),
        ("a mug <atoms:mug", SEEDS, "a tag that does not end"),
        ("a mug", CHECKPOINTS, "two or more of its steps"),
    ],
)
def test_what_cannot_be_planned_is_refused(prompt, mode, message):
    with pytest.raises(UserError, match=message):
        plan(ImageRequest(prompt), mode, [0], {"step 1": "a mug"})


def test_seeds_follow_the_first_which_must_be_given():
    assert list(consecutive_seeds(7.0, 3)) == [7, 8, 9]
    with pytest.raises(UserError, match="no first seed"):
        consecutive_seeds(None, 3)


def test_choices_become_tags_and_other_tags_stay():
    prompt = choose_concepts("a mug <atoms:mug:0.3> <atoms:cat:0.5> on a table", ["mug", "dog"], ["mug", "dog", "cat"])
    assert prompt == "a mug <atoms:mug:0.3> on a table <atoms:dog:1>"
    assert choose_concepts("a mug <atoms:mug-step-1:1>", [], ["mug"]) == "a mug <atoms:mug-step-1:1>"


def test_phrases_are_added_once_before_the_tags():
    assert add_phrase("", "sks mug") == "a photo of sks mug"
    assert add_phrase("on the beach, <atoms:mug:0.5>", "sks mug") == "on the beach, sks mug <atoms:mug:0.5>"
    assert add_phrase("<atoms:mug:0.5>", "sks mug") == "a photo of sks mug <atoms:mug:0.5>"
    assert add_phrase("a SKS mug <atoms:mug>", "sks mug") == "a SKS mug <atoms:mug>"


@pytest.mark.parametrize("name", ["red:mug", "a<b", " mug"])
def test_names_that_no_tag_can_have_are_refused(name):
    with pytest.raises(UserError, match="rename it under Library"):
        choose_concepts("a mug", [name], [name])
