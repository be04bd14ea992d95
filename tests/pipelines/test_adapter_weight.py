"""Adapter weights by block and step: what is read, which layer gets which, and when schedules write weights."""

import copy

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

import atomdiff
from atomdiff.pipelines.adapter_weight import AdapterWeight, StepSchedule
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.pipelines.helpers import add_adapter

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
        (AdapterWeight(-1), [-1.0] * 8),
        ({}, [1.0] * 8),
        ({"weight": 2, "blocks": {}}, [2.0] * 8),
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
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_weight_is_refused(value):
    with pytest.raises(UserError, match="give a number, or|expected shares"):
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


@pytest.fixture(scope="module")
def loaded(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    for seed, name in enumerate("ab"):
        add_adapter(pipe, name, AtomConfig(channel_block=1, target_modules="conv"), seed=seed)
    add_adapter(pipe, "a", AtomConfig(channel_block=1, target_modules=["q_proj"]), ("text_encoder",), seed=2)
    return pipe


@pytest.fixture
def pipe(loaded):
    return copy.deepcopy(loaded)


def generate(pipe, steps=4, **options):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"latents": noise, "num_inference_steps": steps, "guidance_scale": 1.0} | options
    return pipe("a mug", output_type="latent", **options).images


def written_shares(pipe, generate=generate, path="conv_in", **options):
    """The share of concept `a` in a weight at each call of the UNet."""
    layer = atom_layers(pipe.unet)[path]
    base = layer.unmerged_weight().detach().clone()
    with torch.no_grad():
        full = layer.get_base_layer().weight.clone(), layer.scaling["a"]
        layer.scaling["a"] = 1.0
        direction = layer.adapted_weight(["a"]) - base
        layer.scaling["a"] = full[1]
    seen = []

    def record(*_):
        change = layer.get_base_layer().weight.detach() - base
        seen.append(float((change * direction).sum() / direction.square().sum()))

    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: record() or forward(*args, **kwargs)
    try:
        generate(pipe, **options)
    finally:
        del pipe.unet.forward
    return [round(share, 3) for share in seen]


def test_weights_follow_the_steps(pipe):
    atomdiff.set_active(pipe, {"a": {"weight": 2.0, "steps": {0: 1, 1: 0.25}, "blocks": {"up": 0.5}}})
    expected = [2.0, 1.5, 1.0, 0.5]
    assert written_shares(pipe) == expected
    assert written_shares(pipe) == expected  # and again from the start
    assert written_shares(pipe, path="up_blocks.1.resnets.0.conv1") == [share / 2 for share in expected]
    assert written_shares(pipe, guidance_scale=5.0, num_images_per_prompt=2, latents=None) == expected
    assert written_shares(pipe, steps=1) == [2.0]
    assert written_shares(pipe, steps=2) == [2.0, 0.5]
    for place in ("cpu", "device"):
        atomdiff.set_active(pipe, {"a": {"steps": {0.5: 1, 0.6: 0}}}, offload_base=place)
        assert written_shares(pipe, steps=5) == [1, 1, 1, 0, 0]


def test_images_of_a_flat_schedule_are_those_without_one(pipe):
    atomdiff.set_active(pipe, {"a": 0.5})
    flat = generate(pipe)
    atomdiff.set_active(pipe, {"a": {"steps": {0: 0.5, 1: 0.5}}})
    assert (generate(pipe) - flat).abs().max() > 1e-4  # text encoders have no steps
    atomdiff.set_active(pipe, {"a": {"blocks": {"unet": 1, "text_encoder": 0.5}, "steps": {0: 0.5, 1: 0.5}}})
    assert torch.equal(generate(pipe), flat)
    atomdiff.set_active(pipe, {"a": {"blocks": {"text_encoder": 0.5}, "steps": {0: 0.5, 1: 0.4}}})
    assert not torch.equal(generate(pipe), flat)


def test_only_layers_that_change_are_written(pipe, monkeypatch):
    both = {"a": {"steps": {0: 1, 0.5: 1, 1: 0}, "blocks": {"conv_in": 1, "unet": 0}}, "b": 0.5}
    atomdiff.set_active(pipe, both)
    written = []
    layer_type = type(atom_layers(pipe.unet)["conv_in"])
    write = layer_type.write
    monkeypatch.setattr(layer_type, "write", lambda self, *args: written.append(self) or write(self, *args))
    generate(pipe, steps=5)
    assert written == [atom_layers(pipe.unet)["conv_in"]] * 2


def test_img2img_starts_where_it_starts(pipe):
    image2image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image2image.set_progress_bar_config(disable=True)
    atomdiff.set_active(image2image, {"a": {"steps": {0: 1, 1: 0}}})

    def generate_again(pipe):
        options = {"num_inference_steps": 5, "strength": 0.6, "output_type": "latent"}
        image2image("a mug", image=torch.rand(1, 3, 32, 32), **options)

    assert written_shares(image2image, generate_again) == [0.5, 0.25, 0.0]


def test_other_schedulers_and_scaled_timesteps_are_followed(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
    assert written_shares(pipe, steps=3) == [1.0, 0.5, 0.0]

    class Scheduler:
        timesteps, config = torch.tensor([900.0, 600.0, 20.0]), {"num_train_timesteps": 1000}

    pipe.scheduler = Scheduler()
    seen = []
    schedule = StepSchedule(pipe, linear := torch.nn.Linear(1, 1), seen.append)
    for steps in (pipe.scheduler.timesteps, pipe.scheduler.timesteps / 1000):
        for step in steps:
            schedule._before(linear, (None,), {"timestep": step.expand(2).to(torch.bfloat16)})
    assert seen == [0.0, 0.5, 1.0] * 2


def test_calls_without_steps_change_nothing(pipe):
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
    before = pipe.unet.conv_in.base_layer.weight.clone()
    pipe.scheduler.timesteps = torch.tensor([])
    with torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 3, 32))
    assert torch.equal(pipe.unet.conv_in.base_layer.weight, before)


ENDS = {
    "restore": atomdiff.restore,
    "merge": atomdiff.merge,
    "unload": lambda pipe: atomdiff.unload_atoms(pipe, "b"),
    "next": lambda pipe: atomdiff.set_active(pipe, {"a": 1.0}),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_schedule_ends(pipe, end):
    hooks = len(pipe.unet._forward_pre_hooks)
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0.5}}, "b": 0.0})
    assert len(pipe.unet._forward_pre_hooks) == hooks + 1
    generate(pipe)
    ENDS[end](pipe)
    assert len(pipe.unet._forward_pre_hooks) == hooks and "_atomdiff_schedule" not in vars(pipe.unet)
    assert len(set(written_shares(pipe))) == 1


def test_a_schedule_leaves_disabled_layers_alone_and_takes_no_notice_of_other_weights(pipe):
    atomdiff.set_active(pipe, {})
    base = generate(pipe)
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
    expected = generate(pipe)
    for layer in atom_layers(pipe.unet).values():
        layer.set_scale("a", 1.0)  # the weight is at 0 by now
    assert torch.equal(generate(pipe), expected)
    for model in (pipe.unet, pipe.text_encoder):
        model.disable_adapters()
    assert torch.equal(generate(pipe), base)
    for model in (pipe.unet, pipe.text_encoder):
        model.enable_adapters()
    torch.testing.assert_close(generate(pipe), expected, atol=1e-5, rtol=0)
