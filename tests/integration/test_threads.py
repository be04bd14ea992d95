"""Two threads on one model: each image is the one that it would be alone, and every bit of the base is back."""

import copy

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.tuner import AtomConfig, adapter_state
from atomdiff.utils.errors import UserError
from atomdiff.utils.threads import ThreadLocal
from tests.helpers import add_adapter, assert_unchanged, predict_batch, sharing_pipeline, snapshot, together

pytestmark = pytest.mark.slow

ROUNDS = 6
CONFIGS = {
    "a": AtomConfig(channel_block=4, target_modules="all"),
    "b": AtomConfig(channel_block=1, target_modules="conv"),
}


@pytest.fixture
def pipe(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    pipe.set_progress_bar_config(disable=True)
    before = snapshot(pipe)
    add_adapter(pipe, "a", CONFIGS["a"])
    add_adapter(pipe, "a", AtomConfig(channel_block=2, target_modules="attention"), ["text_encoder"])
    add_adapter(pipe, "b", CONFIGS["b"], seed=1)
    for model in (pipe.unet, pipe.text_encoder):
        adapter_state.activate(model, ["a"])
    yield pipe
    atomdiff.unload_atoms(pipe)
    assert_unchanged(pipe, before)


def same(result, alone):
    """Whether images are equal but for sums in another order: PyTorch may split them otherwise beside other threads."""
    return torch.allclose(result, alone, atol=1e-5, rtol=0)


def generate(pipe, prompts, seed=0, steps=2):
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return pipe(prompts, latents=latents, num_inference_steps=steps, guidance_scale=4.0, output_type="latent").images


def assert_as_alone(*calls, rounds=ROUNDS):
    """Check that calls give at the same time what each gives alone."""
    expected = [call() for call in calls]
    for results, alone in zip(together(*calls, rounds=rounds), expected, strict=True):
        assert len(results) == rounds and all(same(result, alone) for result in results)


def hooked(pipe):
    """Layers that are not plain: hooks of others, and layers of another method around."""
    for number, module in enumerate(list(pipe.unet.modules())):
        if type(module) in (torch.nn.Conv2d, torch.nn.Linear) and number % 2:
            module.register_forward_hook(lambda module, inputs, output: output + 1e-3)


UNDER = {
    "unmerged": lambda pipe: None,
    "hooked": hooked,
    "below another method": lambda pipe: (
        add_adapter(pipe, "lora", LoraConfig(r=2, target_modules=["to_q", "conv1"])),
        pipe.unet.set_adapters(["a", "lora"]),
    ),
    "merged": atomdiff.merge,
    "written": lambda pipe: atomdiff.set_active(pipe, {"a": 0.5, "b": 1.0}, offload_base="cpu"),
    "disabled": lambda pipe: (atomdiff.merge(pipe), pipe.disable_lora()),
}


@pytest.mark.parametrize("under", UNDER)
def test_two_threads_on_one_unet(pipe, under):
    UNDER[under](pipe)
    assert_as_alone(lambda: predict_batch(pipe, 2, 0), lambda: predict_batch(pipe, 2, 1))


@pytest.mark.parametrize("merged", [False, True])
def test_two_pipelines_over_one_unet_and_text_encoder(pipe, merged):
    other = sharing_pipeline(pipe, "scheduler", "tokenizer")  # a tokenizer holds how it pads, which both would change
    if merged:
        atomdiff.merge(pipe)
    assert_as_alone(lambda: generate(pipe, ["a red mug"]), lambda: generate(other, ["a cat", "a robot"], 1), rounds=3)


def mixing(pipe, samples, seed):
    def call():
        with atomdiff.mixed_batch(pipe, samples):
            return predict_batch(pipe, len(samples), seed)

    return call


SAMPLES = ["a", None, {"a": 0.5, "b": 1.0}], ["b", {"b": -0.5}]


@pytest.mark.parametrize("under", ["unmerged", "hooked", "written"])
def test_each_thread_mixes_samples_of_its_own_or_none(pipe, under):
    UNDER[under](pipe)
    calls = [mixing(pipe, SAMPLES[0], 0), mixing(pipe, SAMPLES[1], 1), lambda: predict_batch(pipe, 2, 2)]
    attributes = sorted(vars(pipe))
    assert_as_alone(*calls)
    assert sorted(vars(pipe)) == attributes and not pipe.unet._forward_pre_hooks


def test_samples_with_schedules_in_two_threads(pipe):
    other = sharing_pipeline(pipe, "scheduler")
    samples = [{"a": {"steps": {0: 1, 1: 0.1}}}, None], [{"b": {"weight": 2, "steps": {0: 0, 1: 1}}}, "a"]

    def call(pipe, samples, seed):
        with atomdiff.mixed_batch(pipe, samples):
            return generate(pipe, ["a red mug", "a cat"], seed)

    assert_as_alone(lambda: call(pipe, samples[0], 0), lambda: call(other, samples[1], 1), rounds=3)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_by_step_in_two_threads(pipe, compiled):
    other = sharing_pipeline(pipe, "scheduler", "tokenizer")
    if compiled:
        pipe.unet._compiled_call_impl = pipe.unet._call_impl  # as `compile` leaves it, without the minute it takes
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0.1}}, "b": {"weight": 2, "steps": {0: 0, 1: 1}}})
    calls = [lambda: generate(pipe, ["a red mug"], steps=3), lambda: generate(other, ["a cat", "a robot"], 1, steps=4)]
    assert_as_alone(*calls, rounds=3)


def test_a_call_that_failed_or_was_interrupted_lets_other_threads_in(pipe):
    atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0.1}}})
    expected = predict_batch(pipe, 2)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        handle = pipe.unet.conv_in.register_forward_pre_hook(fail)
        with pytest.raises(error):
            predict_batch(pipe, 2)
        handle.remove()
        assert same(together(lambda: predict_batch(pipe, 2))[0][0], expected)


def test_a_batch_that_only_another_thread_generates_is_warned_of(pipe):
    with pytest.warns(UserWarning, match="called only in threads other than that of its mixed_batch"):
        with atomdiff.mixed_batch(pipe, ["a", None]):
            together(lambda: predict_batch(pipe, 2))


@torch._dynamo.config.patch(recompile_limit=64)  # layers share one forward, and every kind of call compiles it anew
def test_compiled_models_of_two_threads(pipe):
    torch._dynamo.reset()
    calls = [mixing(pipe, SAMPLES[0][::2], 0), mixing(pipe, SAMPLES[1], 1), lambda: predict_batch(pipe, 2, 2)]
    expected = [call() for call in calls]
    compiled = pipe.unet.conv_in, pipe.unet.conv_out
    for layer in compiled:
        layer.compile(backend="eager", fullgraph=True)
    for call, alone in zip(calls, expected, strict=True):  # one after the other: the compiler itself is not for threads
        torch.testing.assert_close(together(call)[0][0], alone, atol=1e-5, rtol=0)
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # as `compile` leaves it, without the minute it takes
    with atomdiff.mixed_batch(pipe, ["a", None]):
        with pytest.raises(UserError, match="found a batch of 3 for 2 samples"):
            predict_batch(pipe, 3)
        assert together(lambda: predict_batch(pipe, 3, 2))
        predict_batch(pipe, 2)
    assert not hasattr(pipe.unet._compiled_call_impl, "hooks")
    torch._dynamo.reset()


def test_values_of_threads_are_copied_empty():
    here = ThreadLocal()
    here.value = 1
    assert copy.deepcopy(here).value is None and here.value == 1
    assert together(lambda: here.value) == [[None]]
