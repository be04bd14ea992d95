"""Adapter weights by denoising step: when weights are written, and which."""

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

import atomdiff
from atomdiff.pipelines import switch
from atomdiff.pipelines.step_schedule import StepSchedule, schedule_of
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, sharing_pipeline


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    schedule = StepSchedule(pipe, seen.append)
    for steps in (pipe.scheduler.timesteps, pipe.scheduler.timesteps / 1000):
        for step in steps:
            schedule._before(pipe.unet, (None,), {"timestep": step.expand(2).to(torch.bfloat16)})
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
    assert len(pipe.unet._forward_pre_hooks) == hooks and schedule_of(pipe.unet) is None
    assert len(set(written_shares(pipe))) == 1
    assert {layer.scaling["a"] for layer in atom_layers(pipe.unet).values()} == {1.0}  # not that of the last step


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_write_that_fails_is_done_again(pipe, monkeypatch, stop):
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
    expected = written_shares(pipe)
    layer_type, calls = type(atom_layers(pipe.unet)["conv_in"]), []
    write = layer_type.write

    def fail(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise stop("in the middle")
        write(self, *args)

    with monkeypatch.context() as patch, pytest.raises(stop, match="in the middle"):
        patch.setattr(layer_type, "write", fail)
        generate(pipe)
    assert written_shares(pipe, path="conv_out") == written_shares(pipe) == expected == [1.0, 0.667, 0.333, 0.0]


@pytest.mark.slow
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


def test_a_schedule_follows_the_scheduler_of_the_pipeline_that_generates(pipe):
    other = sharing_pipeline(pipe)
    other.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        write = switch._Writer.__call__
        patch.setattr(
            switch._Writer, "__call__", lambda self, share, **o: (shares.append(share), write(self, share, **o))[1]
        )
        atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
        shares.clear()
        generate(pipe, 2)
        generate(other, 3)
    assert shares == [0.0, 1.0, 0.0, 0.5, 1.0]
    atomdiff.restore(other)
    assert schedule_of(pipe.unet) is None


def test_steps_of_no_denoiser_are_refused(pipe):
    pipe.unet = None
    with pytest.raises(UserError, match="this StableDiffusionPipeline has no unet, whose steps 'a' could follow"):
        atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}})
    atomdiff.set_active(pipe, {"a": 0.5})
