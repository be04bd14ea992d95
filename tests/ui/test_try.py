"""The images of the page: which are asked for, and how they are made."""

import json

import numpy as np
import pytest
from PIL import Image

from atomdiff.sampling.config import SampleConfig
from atomdiff.ui import library as ui_library
from atomdiff.ui.images import ImageRequest, PipelineImages
from atomdiff.ui.try_tab import _add_phrase, plan
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import QUICK


def test_several_seeds():
    asked = plan("a mug", {"mug": 0.5}, "Several seeds", range(3, 5))
    assert asked == {f"seed {seed}": ImageRequest("a mug <atoms:mug:0.5>", seed) for seed in (3, 4)}


def test_before_and_after_have_the_same_seed():
    asked = plan("a mug", {"mug": 1}, "Before and after", range(2))
    assert [(request.prompt, request.seed) for request in asked.values()] == [
        ("a mug", 0),
        ("a mug <atoms:mug:1>", 0),
        ("a mug", 1),
        ("a mug <atoms:mug:1>", 1),
    ]


def test_weights_rise_in_a_row_of_one_seed():
    asked = plan("a mug", {"mug": 0.8, "cat": 0.4}, "Several weights", [7])
    assert asked["seed 7, weight x 0.5"].prompt == "a mug <atoms:mug:0.4> <atoms:cat:0.2>"
    assert {request.seed for request in asked.values()} == {7} and len(asked) == 6


@pytest.mark.parametrize(
    ("prompt", "weights", "mode", "message"),
    [
        (" ", {}, "Several seeds", "no prompt"),
        ("<atoms:mug>", {}, "Several seeds", "no prompt"),
        ("a mug", {}, "Before and after", "no concept to compare"),
        ("a mug <atoms:mug>", {"mug": 1}, "Several seeds", "both chosen and in a tag"),
    ],
)
def test_what_cannot_be_planned_is_refused(prompt, weights, mode, message):
    with pytest.raises(UserError, match=message):
        plan(prompt, weights, mode, [0])


def test_phrases_are_added_once():
    assert _add_phrase("sks mug", "") == "a photo of sks mug"
    assert _add_phrase("sks mug", "on the beach,") == "on the beach, sks mug"
    assert _add_phrase("sks mug", "a SKS mug") == "a SKS mug"


def test_images_are_made_with_concepts_that_stay_loaded(library, concept_file, tiny_pipe_folder, tmp_path):
    ui_library.add(library, concept_file, None)
    config = SampleConfig(str(tiny_pipe_folder), str(tmp_path / "images"), **QUICK)
    images = PipelineImages(library)
    asked = list(plan("a photo of sks mug", {"mug": 1}, "Before and after", [3]).values())
    made = dict(images.make(asked, config))
    before, after = (np.asarray(Image.open(made[request])).astype(int) for request in asked)
    assert np.abs(before - after).max() > 2
    with Image.open(made[asked[1]]) as image:
        assert image.info["seed"] == "3" and json.loads(image.info["concepts"])[0]["weight"] == 1.0
    cache = images._cache
    again = dict(images.make(asked, SampleConfig(str(tiny_pipe_folder), str(tmp_path / "again"), **QUICK)))
    assert images._cache is cache and cache._num_loads == 1
    assert made[asked[1]].read_bytes() == again[asked[1]].read_bytes()
    with pytest.raises(UserError, match="no concept 'cat'"):
        list(images.make([ImageRequest("a <atoms:cat>")], config))
