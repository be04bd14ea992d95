"""Sliders of weights write the tag in the prompt, and stand where it says."""

import pytest

from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.ui import library as ui_library
from atomdiff.ui.weights import move as move_slider
from atomdiff.ui.weights import position, sliders_of


def move(prompt, *moves):
    for slider, value in moves:
        prompt = move_slider(prompt, "mug", slider, value)
    return prompt


def test_sliders_write_the_tag():
    prompt = move("a mug", ("weight", 0.8))
    assert prompt == "a mug <atoms:mug:0.8>"
    prompt = move(prompt, ("down", 0.5), ("text_encoder", 0))
    assert prompt == 'a mug <atoms:mug:{"weight": 0.8, "blocks": {"down": 0.5, "text_encoder": 0}}>'
    prompt = move(prompt, ("down", 1), ("text_encoder", 1), ("last", 0.2))
    assert prompt == 'a mug <atoms:mug:{"weight": 0.8, "steps": {"0": 1, "1": 0.2}}>'
    assert move(prompt, ("last", 1)) == "a mug <atoms:mug:0.8>"


def test_what_is_typed_beyond_the_ends_is_the_end():
    assert move("a mug", ("weight", 20)) == "a mug <atoms:mug:1.5>"
    assert move("a mug", ("weight", -1)) == "a mug <atoms:mug:0>"


def test_what_a_hand_has_written_stays():
    prompt = '<atoms:mug:{"blocks": {"up.1": 0}, "steps": {"0.5": 0.4}, "keep": 0.5}> a mug'
    moved = move(prompt, ("mid", 0.7), ("first", 0.9))
    assert moved == (
        '<atoms:mug:{"weight": 1, "blocks": {"up.1": 0, "mid": 0.7}, '
        '"steps": {"0": 0.9, "0.5": 0.4, "1": 0.4}, "keep": 0.5}> a mug'
    )


@pytest.mark.parametrize(
    ("slider", "value"), [("weight", 0.8), ("down", 0.5), ("mid", 1), ("first", 0.6), ("last", 0.2)]
)
def test_sliders_stand_where_the_tag_says(slider, value):
    tag = '<atoms:mug:{"weight": 0.8, "blocks": {"down": 0.5}, "steps": {"0.25": 0.6, "1": 0.2}}>'
    assert position(split_tags(f"a mug {tag}")[1]["mug"], slider) == pytest.approx(value)


def test_a_concept_has_sliders_for_blocks_in_which_it_has_layers(library, concept_file):
    ui_library.add(library, concept_file, None)
    found = sliders_of(library, "mug")
    assert {"down", "mid", "up", "first", "last"} == found.keys()  # nothing was trained in the text encoder
