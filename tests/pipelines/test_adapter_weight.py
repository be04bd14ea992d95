"""Adapter weights by block and step: what is read, and which layer gets which."""

import numpy as np
import pytest

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.utils.errors import UserError

MODULES = ["unet.conv_in", "unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.1.attentions.0.proj_in"]
MODULES += [
    "unet.mid_block.resnets.0.conv1",
    "unet.up_blocks.0.attentions.1.proj_in",
    "unet.up_blocks.1.resnets.0.conv1",
]
MODULES += ["unet.up_blocks.10.resnets.0.conv1", "text_encoder.encoder.layers.0.mlp.fc1"]


def weights(value, progress=None):
    weight = AdapterWeight.read(value)
    return [weight.at(module, progress) for module in MODULES]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [0.5] * 8),
        (np.float64(2), [2.0] * 8),
        (np.float32(0.5), [0.5] * 8),
        (AdapterWeight(-1), [-1.0] * 8),
        ({}, [1.0] * 8),
        ({"weight": 2, "blocks": {}}, [2.0] * 8),
        ({"keep": 0.5}, [1.0] * 8),
        ({"keep": 0, "weight": 2, "blocks": {"down": 3}}, [0.0] * 8),
        ({"blocks": {"down": 0.5}}, [1, 0.5, 0.5, 1, 1, 1, 1, 1]),
        ({"weight": 2, "blocks": {"mid": 0, "up.1": 3}}, [2, 2, 2, 0, 2, 6, 2, 2]),
        ({"blocks": {"up": 2, "up.1": 3, "up_blocks.10": 4}}, [1, 1, 1, 1, 2, 3, 4, 1]),
        ({"blocks": {"text_encoder": 0.1, "unet": 0.2}}, [0.2] * 7 + [0.1]),
        ({"blocks": {"encoder.layers.0": 0.1, "conv_in": 0.2}}, [0.2, 1, 1, 1, 1, 1, 1, 0.1]),
        ({"blocks": {"unet.up": 2, "up.1": 3}}, [1, 1, 1, 1, 2, 3, 2, 1]),  # the further one, not the longer name
        ({"blocks": {"up.1": 3, "unet": 2}}, [2, 2, 2, 2, 2, 3, 2, 1]),
        # As diffusers nests them:
        ({"down": 0.5, "mid": 0.2, "up": {"block_0": 2, "block_1": 3}}, [1, 0.5, 0.5, 0.2, 2, 3, 1, 1]),
        ({"unet": {"down": 0.5, "up": {"block_0": [7, 4]}}, "text_encoder": 0}, [1, 0.5, 0.5, 1, 4, 1, 1, 0]),
        ({"blocks": {"up": {"block_1": 3}, "down.block_0": 2}}, [1, 2, 1, 1, 1, 3, 1, 1]),
    ],
)
def test_layers_get_the_weight_of_the_part_they_are_in(value, expected):
    assert weights(value) == pytest.approx(expected)
    assert {type(weight) for weight in weights(value)} == {float}


def test_factors_of_steps_lie_on_straight_lines():
    schedule = {"weight": 2, "blocks": {"down": 0.5}, "steps": {1: 0, 0.5: 1, 0.0: 3}}
    weight = AdapterWeight.read(schedule)
    seen = [weight.at("unet.conv_in", progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert seen == pytest.approx([6, 4, 2, 1, 0])
    assert weight.at("unet.down_blocks.0.x", 0.25) == pytest.approx(2)
    assert weight.at("text_encoder.x", None) == 2
    assert AdapterWeight.read({"steps": [(0.2, 5)]}).at("unet.x", 0.9) == 5
    assert AdapterWeight.read({"steps": {"0": 1, "1": 0}}).at("unet.x", 1.0) == 0  # as JSON and YAML have keys


@pytest.mark.parametrize(
    "value",
    [
        "strong", None, [1], True, float("nan"), float("-inf"), 10**400, {"weight": None}, {"weight": "1"},
        {"weight": True}, {"blocks": {"down": float("nan")}}, {"blocks": {"down": "x"}}, {"blocks": 3},
        {"blocks": {3: 1.0}}, {"blocks": {"": 1.0}}, {"down": None}, {"up": {"block_0": {1: 1}}}, {7: 1.0},
        {"steps": {-0.1: 1}}, {"steps": {1.01: 1}}, {"steps": {float("nan"): 1}}, {"steps": {0: float("nan")}},
        {"steps": {"early": 1}}, {"steps": 0.5}, {"steps": [1, 2]}, {"steps": {0: None}}, {"steps": {10**400: 1}},
        {"keep": -0.1}, {"keep": 1.1}, {"keep": None}, {"keep": "1"}, {"keep": True}, {"keep": float("nan")},
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_weight_is_refused(value):
    with pytest.raises(UserError, match="give a number, or|expected shares|expected a share"):
        AdapterWeight.read(value)


def test_fields_of_a_wrong_kind_are_refused_too():
    for fields in ({"blocks": [1]}, {"steps": 3}, {"blocks": None}):
        with pytest.raises(UserError, match="give a number"):
            AdapterWeight(**fields)


def test_parts_without_a_layer_are_named():
    AdapterWeight.read({"down": 1, "unet.up.1": 1, "text_encoder": 1, "mid_block": 1}).check("a", MODULES)
    for part in ("up.2", "down_blocks.0.resnets.0.conv", "vae", "resnets"):
        with pytest.raises(
            UserError, match=r"'a' has no layer in '\w.*has layers in: text_encoder.encoder.layers, unet"
        ):
            AdapterWeight(blocks={part: 1.0}).check("a", MODULES)
