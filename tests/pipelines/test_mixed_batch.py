"""Mixed batches: each sample is the image that its concepts give alone, and nothing is left behind."""

import copy

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig

import atomdiff
from atomdiff.pipelines.models import pipeline_models
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.mixed_batch import BatchLayout
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter
from tests.pipelines.helpers import (
    VARIANTS,
    addresses,
    assert_same_bits,
    bits,
    generate,
    noise,
    predict_repeated,
)

SAMPLES = [*VARIANTS, None, {"spatial": 0.5, "sparse": -0.7, "dct": 1.2}, ["joint", "separable"], {}, {"dct": 0}]

PROMPTS = ["a photo of a mug", "a red cat", "the beach", "a robot with a teapot"]


def prompts_for(samples):
    return [PROMPTS[number % len(PROMPTS)] for number in range(len(samples))]


def alone(pipe, samples, latents, images=1, **options):
    """The images of each sample, generated for itself with the same noise, unmerged."""
    generated = []
    for number, (sample, prompt) in enumerate(zip(samples, prompts_for(samples), strict=True)):
        atomdiff.set_active(pipe, {} if sample is None else sample)
        for image in range(images):
            one = number * images + image
            generated.append(generate(pipe, [prompt], latents[one : one + 1], **options))
    atomdiff.restore(pipe)
    return torch.cat(generated)


def assert_samples(pipe, samples, images=1, **options):
    latents = noise(len(samples) * images)
    expected = alone(pipe, samples, latents, images, **options)
    with atomdiff.mixed_batch(pipe, samples):
        mixed = generate(pipe, prompts_for(samples), latents, num_images_per_prompt=images, **options)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    return expected


def state(pipe):
    models = pipeline_models(pipe)
    return {
        "modules": [
            (path, id(module), sorted(set(vars(module)) - {"_codes"}), len(module._forward_pre_hooks))
            for model in models.values()
            for path, module in model.named_modules()
        ],
        "layers": [
            (
                layer.active_adapters,
                layer.disable_adapters,
                dict(layer.scaling),
                list(layer.merged_adapters),
                layer.mixed_batch,
            )
            + (layer.holds_merged, layer.written, layer.base_weight.offloaded)
            for model in models.values()
            for layer in atom_layers(model).values()
        ],
        "pipe": sorted(vars(pipe)),
    }


def assert_untouched(pipe, before):
    assert_same_bits(bits(pipe), before[0])
    assert addresses(pipe) == before[1]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_every_variant_and_set_is_the_image_generated_alone(pipe, guidance):
    expected = assert_samples(pipe, SAMPLES, guidance_scale=guidance)
    base = alone(pipe, [None] * len(SAMPLES), noise(len(SAMPLES)), guidance_scale=guidance)
    differences = (expected - base).abs().amax((1, 2, 3))
    assert [bool(difference > 1e-3) for difference in differences] == [bool(r) and r != {"dct": 0} for r in SAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_several_images_a_prompt(pipe, guidance):
    assert_samples(pipe, ["spatial", None, {"dct": 0.5, "joint": 1.0}], images=2, guidance_scale=guidance)


def test_a_batch_of_one_and_one_prompt_as_text(pipe):
    assert_samples(pipe, ["joint"])
    expected = alone(pipe, ["dct"], noise(1))
    with atomdiff.mixed_batch(pipe, ["dct"]):
        mixed = generate(pipe, PROMPTS[0], noise(1))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_negative_prompts_and_embeddings(pipe):
    samples = ["spatial", "separable"]
    latents = noise(2)
    negative = ["a cat", "a table"]
    expected = []
    for number, sample in enumerate(samples):
        atomdiff.set_active(pipe, sample)
        one = latents[number : number + 1]
        expected.append(generate(pipe, [PROMPTS[number]], one, negative_prompt=[negative[number]]))
    atomdiff.restore(pipe)
    with atomdiff.mixed_batch(pipe, samples):
        mixed = generate(pipe, PROMPTS[:2], latents, negative_prompt=negative)
        prompt, without = pipe.encode_prompt(PROMPTS[:2], "cpu", 1, True, negative_prompt=negative)
        again = generate(pipe, None, latents, prompt_embeds=prompt, negative_prompt_embeds=without)
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(again, mixed, atol=1e-5, rtol=0)


def test_models_that_are_not_named_are_left_alone(pipe):
    samples, latents = ["spatial", {"joint": 0.5}], noise(2)
    expected = alone(pipe, samples, latents)
    with atomdiff.mixed_batch(pipe, samples, components=["text_encoder"]):
        prompt, without, *_ = pipe.encode_prompt(prompts_for(samples), "cpu", 1, True)
    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": without}
    with atomdiff.mixed_batch(pipe, samples, components=["unet"]):
        pipe.encode_prompt(PROMPTS[:3], "cpu", 1, True)  # more prompts than samples
        mixed = generate(pipe, None, latents, **embeds)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


STEPS = {"weight": 1.5, "steps": {0: 1, 1: 0.2}}
SCHEDULED = [{"separable": STEPS, "spatial": 0.5}, "separable", None, {"joint": {**STEPS, "blocks": {"down": 0.3}}}]


@pytest.mark.slow
def test_samples_have_schedules_and_blocks_of_their_own(pipe):
    expected = assert_samples(pipe, SCHEDULED, num_inference_steps=3)
    flat = alone(pipe, [{"separable": 1.5, "spatial": 0.5}], noise(1), num_inference_steps=3)
    assert (expected[0] - flat[0]).abs().max() > 1e-3
    assert_samples(pipe, SCHEDULED[:2], images=2, num_inference_steps=2, guidance_scale=1.0)


UNDER = {
    "unmerged": lambda pipe: pipe.unet.set_adapters(["joint"], [0.7]),
    "merged": lambda pipe: (pipe.unet.set_adapters(["joint"], [0.7]), atomdiff.merge(pipe)),
    "set on the device": lambda pipe: atomdiff.set_active(pipe, {"joint": 0.7, "dct": 1.0}),
    "set with the base on the cpu": lambda pipe: atomdiff.set_active(pipe, "separable", offload_base="cpu"),
    "bare": lambda pipe: atomdiff.set_active(pipe, {}),
    "scheduled": lambda pipe: atomdiff.set_active(pipe, {"joint": STEPS, "dct": 1.0}),
    "disabled": lambda pipe: pipe.disable_lora(),
}


@pytest.mark.slow
@pytest.mark.parametrize("under", UNDER)
def test_what_is_active_underneath_does_not_matter_and_stays(pipe, under):
    samples = ["spatial", None, SCHEDULED[0]]
    expected = alone(pipe, samples, noise(3))
    UNDER[under](pipe)
    generate(pipe, PROMPTS[:1], noise(1))
    before, kept = state(pipe), (bits(pipe), addresses(pipe))
    with atomdiff.mixed_batch(pipe, samples):
        mixed = generate(pipe, prompts_for(samples), noise(3))
        assert_untouched(pipe, kept)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    assert state(pipe) == before
    assert_untouched(pipe, kept)


@pytest.mark.slow
def test_the_base_in_a_file_underneath(tiny_pipe_folder, variants_template, tmp_path):
    saved = atomdiff.save_atoms(variants_template, tmp_path / "x", "separable", dtype=torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipe_folder)
    pipe.set_progress_bar_config(disable=True)
    atomdiff.load_atoms(pipe, saved, "separable")
    expected = alone(pipe, ["separable", None], noise(2))
    atomdiff.set_active(pipe, {"separable": -1.0}, offload_base="file")
    with atomdiff.mixed_batch(pipe, ["separable", None]):
        mixed = generate(pipe, prompts_for("ab"), noise(2))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    assert all(layer.base_weight.copy is None for layer in atom_layers(pipe.unet).values())


def test_a_schedule_underneath_waits_and_goes_on_afterwards(pipe, monkeypatch):
    atomdiff.set_active(pipe, {"joint": STEPS})
    expected = generate(pipe, PROMPTS[:1], noise(1))
    with atomdiff.mixed_batch(pipe, ["spatial"]), monkeypatch.context() as patch:
        patch.setattr(AtomLayer, "write", lambda *_: pytest.fail("a weight that no sample has was written"))
        generate(pipe, PROMPTS[:1], noise(1))
    assert torch.equal(generate(pipe, PROMPTS[:1], noise(1)), expected)


def test_half_precision_samples_are_close(pipe):
    torch.nn.Module.to(pipe.unet, torch.bfloat16), torch.nn.Module.to(pipe.text_encoder, torch.bfloat16)
    samples = ["spatial", "dct", None, "sparse"]
    latents = noise(4).bfloat16()
    expected = alone(pipe, samples, latents, num_inference_steps=1, guidance_scale=1.0)
    with atomdiff.mixed_batch(pipe, samples):
        mixed = generate(pipe, prompts_for(samples), latents, num_inference_steps=1, guidance_scale=1.0)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - expected).float().abs().mean() < 0.02 < (expected[0] - expected[2]).float().abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("called_before", [False, True])
def test_the_model_can_be_called_directly_and_by_name(pipe, called_before, monkeypatch):
    if called_before:  # with guidance, by the pipeline
        monkeypatch.setattr(pipe, "_guidance_scale", 7.5, raising=False)
    expected = []
    for sample in ("spatial", "separable"):
        atomdiff.set_active(pipe, sample)
        expected.append(predict_repeated(pipe, 1))
    with atomdiff.mixed_batch(pipe, ["spatial", "separable"]):
        torch.testing.assert_close(predict_repeated(pipe, 2), torch.cat(expected), atol=1e-5, rtol=0)
        twice = predict_repeated(pipe, 4)  # two images a sample, side by side
        torch.testing.assert_close(twice, torch.cat(expected).repeat_interleave(2, 0), atol=1e-5, rtol=0)
        named = {"sample": noise(1).expand(2, -1, -1, -1), "timestep": 500}
        text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1)
        with torch.no_grad():
            called = pipe.unet(encoder_hidden_states=text, **named).sample
        torch.testing.assert_close(called, torch.cat(expected), atol=1e-5, rtol=0)
    assert not called_before or pipe._guidance_scale == 7.5


@pytest.mark.slow
def test_all_samples_share_each_product_but_on_a_cpu(pipe, monkeypatch):
    atomdiff.restore(pipe)
    monkeypatch.setattr("atomdiff.tuner.mixed_batch.can_adapt_in_turn", lambda weight, updates: False)
    calls = []
    for place, name in ((torch.nn.functional, "conv2d"), (torch.nn.functional, "linear"), (torch, "bmm")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))

    def products(samples):
        calls.clear()
        with atomdiff.mixed_batch(pipe, samples):
            predict_repeated(pipe, len(samples))
        return len(calls)

    assert products([None]) == products(["spatial"]) == products(SAMPLES) == products([*SAMPLES, *SAMPLES]) > 10


@pytest.mark.parametrize("prompts", [1, 2, 4, 6])
@pytest.mark.parametrize("text_too", [True, False])
def test_a_wrong_number_of_prompts_is_refused(pipe, prompts, text_too):
    if not text_too:
        for name in ("separable", "dct"):
            atomdiff.unload_atoms(pipe, name)
    before, kept = state(pipe), (bits(pipe), addresses(pipe))
    with pytest.raises(
        UserError, match=f"found {prompts} prompts for 3 samples of mixed_batch; give one prompt a sample"
    ):
        with atomdiff.mixed_batch(pipe, ["spatial", None, "joint"]):
            generate(pipe, ["a mug"] * prompts, noise(prompts))
    assert {**state(pipe), "pipe": 0} == {**before, "pipe": 0}  # the pipeline itself remembers its last call
    assert_untouched(pipe, kept)


def test_videos_are_refused(pipe):
    with (
        atomdiff.mixed_batch(pipe, ["spatial", None]),
        pytest.raises(UserError, match="found videos in mixed_batch, which mixes images alone: use set_active"),
    ):
        pipe.unet(torch.zeros(2, 4, 3, 8, 8), 5, torch.zeros(2, 7, 32))


@pytest.mark.slow
def test_a_wrong_batch_of_the_model_is_refused(pipe):
    with atomdiff.mixed_batch(pipe, ["spatial", None, "joint"]):
        for count in (2, 4):
            with pytest.raises(UserError, match=f"found a batch of {count} for 3 samples of mixed_batch"):
                predict_repeated(pipe, count)
        assert len(predict_repeated(pipe, 3)) == 3
    with pytest.raises(ValueError, match=r"tensor of 3 in a mixed batch of 2 samples with 1 image"):
        BatchLayout(2).split(torch.zeros(3, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "found the samples \\[\\]; give a list"),
        (None, "found the samples None; give a list"),
        ("spatial", "found the samples 'spatial'; give a list"),
        ({"spatial": 1.0}, "found the samples {'spatial': 1.0}; give a list"),
        (["spatial", "nobody"], "there is no concept 'nobody'; loaded are"),
        ([{"spatial": float("nan")}], "finite"),
        ([{"dct": {"blocks": {"down.0": 1}}}], "'dct' has no layer in 'down_blocks.0'"),
        ([3], "found the concepts 3: give their names"),
        ([["spatial"], [None]], r"found the concepts \[None\]"),
        (["spatial", "lora"], "'lora' is a LORA adapter: only concepts of atoms, and adapters of activations"),
    ],
)
def test_bad_samples_are_refused_before_anything_changes(pipe, samples, message):
    add_adapter(pipe, "lora", LoraConfig(r=2, target_modules=["to_q"]))
    atomdiff.set_active(pipe, "spatial")
    before = state(pipe)
    with pytest.raises(UserError, match=message):
        with atomdiff.mixed_batch(pipe, samples):
            pytest.fail("it was let in")
    assert state(pipe) == before


def test_other_methods_may_be_there_but_not_act(pipe):
    add_adapter(pipe, "lora", LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    expected = alone(pipe, ["spatial", None], noise(2))
    for activate in (
        lambda: pipe.unet.set_adapters(["lora", "spatial"]),
        lambda: atomdiff.merge(pipe),
        lambda: atomdiff.set_active(pipe, ["lora", "spatial"]),
    ):
        activate()
        with pytest.raises(UserError, match=r"the adapters \['lora'.*\] of another method act on all samples"):
            with atomdiff.mixed_batch(pipe, ["spatial", None]):
                pytest.fail("it was let in")
    atomdiff.set_active(pipe, "spatial")
    with atomdiff.mixed_batch(pipe, ["spatial", None]):
        mixed = generate(pipe, prompts_for("ab"), noise(2))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_errors_within_leave_everything_as_it_was(pipe):
    generate(pipe, PROMPTS[:1], noise(1))
    before, kept = state(pipe), (bits(pipe), addresses(pipe))

    def fail(*_):
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        with atomdiff.mixed_batch(pipe, SCHEDULED):
            generate(pipe, prompts_for(SCHEDULED), noise(4), callback_on_step_end=fail)
    assert state(pipe) == before
    assert_untouched(pipe, kept)


def test_one_mixed_batch_within_another_is_refused(pipe):
    before = state(pipe)
    with atomdiff.mixed_batch(pipe, ["spatial", "joint"]):
        first = predict_repeated(pipe, 2)
        with pytest.raises(UserError, match="a mixed batch in this pipeline already: leave its `with` block first"):
            with atomdiff.mixed_batch(pipe, ["dct"]):
                pytest.fail("it was let in")
        assert torch.equal(predict_repeated(pipe, 2), first)
    assert state(pipe) == before


def test_weights_may_be_switched_within(pipe):
    with atomdiff.mixed_batch(pipe, ["spatial", "joint"]):
        first = predict_repeated(pipe, 2)
        atomdiff.set_active(pipe, "dct", offload_base="cpu")
        torch.testing.assert_close(predict_repeated(pipe, 2), first, atol=1e-6, rtol=0)
        atomdiff.restore(pipe)
        torch.testing.assert_close(predict_repeated(pipe, 2), first, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_compiled_layer_mixes_too(pipe_template):
    torch._dynamo.reset()
    pipe = copy.deepcopy(pipe_template)
    for seed, name in enumerate("ab"):
        add_adapter(pipe, name, AtomConfig(channel_block=1, target_modules=["conv_in"]), seed=seed)
    samples = ["a", None, {"b": 0.5}]
    with atomdiff.mixed_batch(pipe, samples):
        expected = predict_repeated(pipe, 3)
    pipe.unet.conv_in.compile(backend="eager", fullgraph=True)
    atomdiff.set_active(pipe, "b")
    predict_repeated(pipe, 3)
    with atomdiff.mixed_batch(pipe, samples):
        torch.testing.assert_close(predict_repeated(pipe, 3), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_pipeline_that_shares_the_models_mixes_as_the_one_that_mixed_batch_was_given(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    inputs = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    samples = ["spatial", {"separable": {"steps": {0: 0, 1: 2}}}]

    def generate_again(prompts, which, **options):
        generator = [torch.Generator().manual_seed(number) for number in range(2)][which]
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "strength": 0.5} | options
        return other(prompts, inputs[which], generator=generator, **options).images

    for scale in (3.0, 1.0):
        expected = []
        for number, sample in enumerate(samples):
            atomdiff.set_active(pipe, sample)
            expected.append(
                generate_again(PROMPTS[number : number + 1], slice(number, number + 1), guidance_scale=scale)
            )
        atomdiff.restore(pipe)
        with atomdiff.mixed_batch(pipe, samples):
            mixed = generate_again(PROMPTS[:2], slice(None), guidance_scale=scale)
        torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)
        assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_a_pipeline_without_a_denoiser_mixes_nothing(pipe):
    atomdiff.unload_atoms(pipe)
    pipe.unet = None
    with pytest.raises(UserError, match="this StableDiffusionPipeline has no unet, whose batches could be mixed"):
        with atomdiff.mixed_batch(pipe, [None]):
            pytest.fail("it was let in")
