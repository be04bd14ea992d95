"""Mixed batches: each row is the picture that its concepts give alone, and nothing is left behind."""

import copy
import warnings

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig

import atomdiff
from atomdiff.pipelines import switch
from atomdiff.pipelines.models import pipeline_models
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.mixed_batch import BatchLayout
from atomdiff.utils.errors import UserError

SOME = ["conv_in", "conv1", "conv_shortcut", "proj_in", "net.2", "to_k", "q_proj", "fc1"]
CONCEPTS = {
    "spatial": AtomConfig(channel_block=1, num_atoms=6),
    "separable": AtomConfig(channel_block=4, target_modules=SOME),
    "joint": AtomConfig(channel_block=2, joint=True, target_modules=["conv1", "conv_in"]),
    "recursive": AtomConfig(channel_block=1, recursion=2, target_modules=["conv1", "conv_out"]),
    "sparse": AtomConfig(channel_block=2, basis="sparse", num_atoms=12, target_modules=["conv_in", "conv_out"]),
    "dct": AtomConfig(channel_block=8, basis="dct", target_modules="attention"),
}
ROWS = [*CONCEPTS, None, {"spatial": 0.5, "sparse": -0.7, "dct": 1.2}, ["joint", "separable"], {}, {"dct": 0}]


def add(pipe, name, config, parts=("unet",), seed=0):
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        model = getattr(pipe, part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(copy.deepcopy(config), name)
        for key, parameter in model.named_parameters():
            if key.endswith(f".{name}") or f".{name}." in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08


@pytest.fixture(scope="module")
def loaded(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    for seed, (name, config) in enumerate(CONCEPTS.items()):
        add(pipe, name, config, ("unet", "text_encoder") if name in ("separable", "dct") else ("unet",), seed)
    return pipe


@pytest.fixture
def pipe(loaded):
    return copy.deepcopy(loaded)


def noise(count):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def draw(pipe, prompts, latents, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(prompts, latents=latents.clone(), **options).images


PROMPTS = ["a photo of a mug", "a red cat", "the beach", "a robot with a teapot"]


def prompts_for(rows):
    return [PROMPTS[number % len(PROMPTS)] for number in range(len(rows))]


def alone(pipe, rows, latents, images=1, **options):
    """The pictures of each row, generated for itself with the same noise, unmerged."""
    pictures = []
    for number, (row, prompt) in enumerate(zip(rows, prompts_for(rows), strict=True)):
        atomdiff.set_active(pipe, {} if row is None else row)
        for image in range(images):
            one = number * images + image
            pictures.append(draw(pipe, [prompt], latents[one : one + 1], **options))
    atomdiff.restore(pipe)
    return torch.cat(pictures)


def assert_rows(pipe, rows, images=1, **options):
    latents = noise(len(rows) * images)
    expected = alone(pipe, rows, latents, images, **options)
    with atomdiff.mixed_batch(pipe, rows):
        mixed = draw(pipe, prompts_for(rows), latents, num_images_per_prompt=images, **options)
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


def bits(pipe):
    tensors = [t for model in pipeline_models(pipe).values() for t in (*model.parameters(), *model.buffers())]
    return [(tensor.data_ptr(), tensor.detach().clone()) for tensor in tensors]


def assert_same(now, before):
    assert all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in zip(now, before, strict=True))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_every_variant_and_set_is_the_picture_drawn_alone(pipe, guidance):
    expected = assert_rows(pipe, ROWS, guidance_scale=guidance)
    base = alone(pipe, [None] * len(ROWS), noise(len(ROWS)), guidance_scale=guidance)
    differences = (expected - base).abs().amax((1, 2, 3))
    assert [bool(difference > 1e-3) for difference in differences] == [bool(r) and r != {"dct": 0} for r in ROWS]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_several_images_a_prompt(pipe, guidance):
    assert_rows(pipe, ["spatial", None, {"dct": 0.5, "joint": 1.0}], images=2, guidance_scale=guidance)


def test_a_batch_of_one_and_one_prompt_as_text(pipe):
    assert_rows(pipe, ["joint"])
    expected = alone(pipe, ["dct"], noise(1))
    with atomdiff.mixed_batch(pipe, ["dct"]):
        mixed = draw(pipe, PROMPTS[0], noise(1))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_negative_prompts_and_embeddings(pipe):
    rows = ["spatial", "separable"]
    latents = noise(2)
    negative = ["a cat", "a table"]
    expected = []
    for number, row in enumerate(rows):
        atomdiff.set_active(pipe, row)
        one = latents[number : number + 1]
        expected.append(draw(pipe, [PROMPTS[number]], one, negative_prompt=[negative[number]]))
    atomdiff.restore(pipe)
    with atomdiff.mixed_batch(pipe, rows):
        mixed = draw(pipe, PROMPTS[:2], latents, negative_prompt=negative)
        prompt, without = pipe.encode_prompt(PROMPTS[:2], "cpu", 1, True, negative_prompt=negative)
        again = draw(pipe, None, latents, prompt_embeds=prompt, negative_prompt_embeds=without)
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(again, mixed, atol=1e-6, rtol=0)


STEPS = {"weight": 1.5, "steps": {0: 1, 1: 0.2}}
SCHEDULED = [{"separable": STEPS, "spatial": 0.5}, "separable", None, {"joint": {**STEPS, "blocks": {"down": 0.3}}}]


def test_rows_have_schedules_and_blocks_of_their_own(pipe):
    expected = assert_rows(pipe, SCHEDULED, num_inference_steps=3)
    flat = alone(pipe, [{"separable": 1.5, "spatial": 0.5}], noise(1), num_inference_steps=3)
    assert (expected[0] - flat[0]).abs().max() > 1e-3
    assert_rows(pipe, SCHEDULED[:2], images=2, num_inference_steps=2, guidance_scale=1.0)


UNDER = {
    "unmerged": lambda pipe: pipe.unet.set_adapters(["joint"], [0.7]),
    "merged": lambda pipe: (pipe.unet.set_adapters(["joint"], [0.7]), atomdiff.merge(pipe)),
    "set on the device": lambda pipe: atomdiff.set_active(pipe, {"joint": 0.7, "dct": 1.0}),
    "set with the base on the cpu": lambda pipe: atomdiff.set_active(pipe, "separable", offload_base="cpu"),
    "bare": lambda pipe: atomdiff.set_active(pipe, {}),
    "scheduled": lambda pipe: atomdiff.set_active(pipe, {"joint": STEPS, "dct": 1.0}),
    "disabled": lambda pipe: pipe.disable_lora(),
}


@pytest.mark.parametrize("under", UNDER)
def test_what_is_worn_underneath_does_not_matter_and_stays(pipe, under):
    rows = ["spatial", None, SCHEDULED[0]]
    expected = alone(pipe, rows, noise(3))
    UNDER[under](pipe)
    draw(pipe, PROMPTS[:1], noise(1))
    before, kept = state(pipe), bits(pipe)
    with atomdiff.mixed_batch(pipe, rows):
        mixed = draw(pipe, prompts_for(rows), noise(3))
        assert_same(bits(pipe), kept)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    assert state(pipe) == before
    assert_same(bits(pipe), kept)


def test_the_base_in_a_file_underneath(tiny_pipe_folder, loaded, tmp_path):
    saved = atomdiff.save_atoms(loaded, tmp_path / "x", "separable", dtype=torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipe_folder)
    pipe.set_progress_bar_config(disable=True)
    atomdiff.load_atoms(pipe, saved, "separable")
    expected = alone(pipe, ["separable", None], noise(2))
    atomdiff.set_active(pipe, {"separable": -1.0}, offload_base="file")
    with atomdiff.mixed_batch(pipe, ["separable", None]):
        mixed = draw(pipe, prompts_for("ab"), noise(2))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    assert all(layer.base_weight.copy is None for layer in atom_layers(pipe.unet).values())


def test_a_schedule_underneath_goes_on_afterwards(pipe):
    atomdiff.set_active(pipe, {"joint": STEPS})
    expected = draw(pipe, PROMPTS[:1], noise(1))
    with atomdiff.mixed_batch(pipe, ["spatial"]):
        draw(pipe, PROMPTS[:1], noise(1))
    assert torch.equal(draw(pipe, PROMPTS[:1], noise(1)), expected)


def test_half_precision_rows_are_close(pipe):
    torch.nn.Module.to(pipe.unet, torch.bfloat16), torch.nn.Module.to(pipe.text_encoder, torch.bfloat16)
    rows = ["spatial", "dct", None, "sparse"]
    latents = noise(4).bfloat16()
    expected = alone(pipe, rows, latents, num_inference_steps=1, guidance_scale=1.0)
    with atomdiff.mixed_batch(pipe, rows):
        mixed = draw(pipe, prompts_for(rows), latents, num_inference_steps=1, guidance_scale=1.0)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - expected).float().abs().mean() < 0.02 < (expected[0] - expected[2]).float().abs().mean()


def predict(pipe, count):
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)).expand(count, -1, -1)
    with torch.no_grad():
        return pipe.unet(noise(1).expand(count, -1, -1, -1), 500, encoder_hidden_states=text).sample


@pytest.mark.parametrize("called_before", [False, True])
def test_the_model_can_be_called_directly_and_by_name(pipe, called_before, monkeypatch):
    if called_before:  # with guidance, by the pipeline
        monkeypatch.setattr(pipe, "_guidance_scale", 7.5, raising=False)
    expected = []
    for row in ("spatial", "separable"):
        atomdiff.set_active(pipe, row)
        expected.append(predict(pipe, 1))
    with atomdiff.mixed_batch(pipe, ["spatial", "separable"]):
        torch.testing.assert_close(predict(pipe, 2), torch.cat(expected), atol=1e-5, rtol=0)
        twice = predict(pipe, 4)  # two images a row, side by side
        torch.testing.assert_close(twice, torch.cat(expected).repeat_interleave(2, 0), atol=1e-5, rtol=0)
        named = {"sample": noise(1).expand(2, -1, -1, -1), "timestep": 500}
        text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1)
        with torch.no_grad():
            called = pipe.unet(encoder_hidden_states=text, **named).sample
        torch.testing.assert_close(called, torch.cat(expected), atol=1e-5, rtol=0)
    assert not called_before or pipe._guidance_scale == 7.5


def test_all_rows_share_each_product(pipe, monkeypatch):
    atomdiff.restore(pipe)
    calls = []
    for place, name in ((torch.nn.functional, "conv2d"), (torch.nn.functional, "linear"), (torch, "bmm")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, real=real, **k: calls.append(1) or real(*a, **k))

    def products(rows):
        calls.clear()
        with atomdiff.mixed_batch(pipe, rows):
            predict(pipe, len(rows))
        return len(calls)

    assert products([None]) == products(["spatial"]) == products(ROWS) == products([*ROWS, *ROWS]) > 10


@pytest.mark.parametrize("prompts", [1, 2, 4, 6])
@pytest.mark.parametrize("text_too", [True, False])
def test_a_wrong_number_of_prompts_is_refused(pipe, prompts, text_too):
    if not text_too:
        for name in ("separable", "dct"):
            atomdiff.unload_atoms(pipe, name)
    before, kept = state(pipe), bits(pipe)
    with pytest.raises(
        UserError, match=f"found {prompts} prompts for 3 samples of mixed_batch; give one prompt a sample"
    ):
        with atomdiff.mixed_batch(pipe, ["spatial", None, "joint"]):
            draw(pipe, ["a mug"] * prompts, noise(prompts))
    assert {**state(pipe), "pipe": 0} == {**before, "pipe": 0}  # the pipeline itself remembers its last call
    assert_same(bits(pipe), kept)


def test_a_wrong_batch_of_the_model_is_refused(pipe):
    with atomdiff.mixed_batch(pipe, ["spatial", None, "joint"]):
        for count in (2, 4):
            with pytest.raises(UserError, match=f"found a batch of {count} for 3 samples of mixed_batch"):
                predict(pipe, count)
        assert len(predict(pipe, 3)) == 3
    with pytest.raises(ValueError, match=r"tensor of 3 in a mixed batch of 2 samples with 1 image"):
        BatchLayout(2).split(torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("rows", "message"),
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
        (["spatial", "lora"], "'lora' is a LORA adapter: only concepts of atoms mix in one batch"),
    ],
)
def test_bad_rows_are_refused_before_anything_changes(pipe, rows, message):
    add(pipe, "lora", LoraConfig(r=2, target_modules=["to_q"]))
    atomdiff.set_active(pipe, "spatial")
    before = state(pipe)
    with pytest.raises(UserError, match=message):
        with atomdiff.mixed_batch(pipe, rows):
            pytest.fail("it was let in")
    assert state(pipe) == before


def test_other_methods_may_be_there_but_not_act(pipe):
    add(pipe, "lora", LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    expected = alone(pipe, ["spatial", None], noise(2))
    for wear in (
        lambda: pipe.unet.set_adapters(["lora", "spatial"]),
        lambda: atomdiff.merge(pipe),
        lambda: atomdiff.set_active(pipe, ["lora", "spatial"]),
    ):
        wear()
        with pytest.raises(UserError, match=r"the adapters \['lora'.*\] of another method act on all samples"):
            with atomdiff.mixed_batch(pipe, ["spatial", None]):
                pytest.fail("it was let in")
    atomdiff.set_active(pipe, "spatial")
    with atomdiff.mixed_batch(pipe, ["spatial", None]):
        mixed = draw(pipe, prompts_for("ab"), noise(2))
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_errors_within_leave_everything_as_it_was(pipe):
    draw(pipe, PROMPTS[:1], noise(1))
    before, kept = state(pipe), bits(pipe)

    def fail(*_):
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        with atomdiff.mixed_batch(pipe, SCHEDULED):
            draw(pipe, prompts_for(SCHEDULED), noise(4), callback_on_step_end=fail)
    assert state(pipe) == before
    assert_same(bits(pipe), kept)


def test_one_mixed_batch_within_another_is_refused(pipe):
    before = state(pipe)
    with atomdiff.mixed_batch(pipe, ["spatial", "joint"]):
        first = predict(pipe, 2)
        with pytest.raises(UserError, match="a mixed batch in this pipeline already: leave its `with` block first"):
            with atomdiff.mixed_batch(pipe, ["dct"]):
                pytest.fail("it was let in")
        assert torch.equal(predict(pipe, 2), first)
    assert state(pipe) == before


def test_weights_may_be_switched_within(pipe):
    with atomdiff.mixed_batch(pipe, ["spatial", "joint"]):
        first = predict(pipe, 2)
        atomdiff.set_active(pipe, "dct", offload_base="cpu")
        torch.testing.assert_close(predict(pipe, 2), first, atol=1e-6, rtol=0)
        atomdiff.restore(pipe)
        torch.testing.assert_close(predict(pipe, 2), first, atol=1e-6, rtol=0)


def test_a_compiled_layer_mixes_too(pipe_template):
    torch._dynamo.reset()
    pipe = copy.deepcopy(pipe_template)
    for seed, name in enumerate("ab"):
        add(pipe, name, AtomConfig(channel_block=1, target_modules=["conv_in"]), seed=seed)
    rows = ["a", None, {"b": 0.5}]
    with atomdiff.mixed_batch(pipe, rows):
        expected = predict(pipe, 3)
    pipe.unet.conv_in.compile(backend="eager", fullgraph=True)
    atomdiff.set_active(pipe, "b")
    predict(pipe, 3)
    with atomdiff.mixed_batch(pipe, rows):
        torch.testing.assert_close(predict(pipe, 3), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def edit_pipe(template):
    """A pipeline that has one group for text and image, one for the image alone, and one for neither."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(template.unet.config, in_channels=8)
    parts = copy.deepcopy(template).components | {"unet": unet.eval()}
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def perturbed_pipe(template):
    """A pipeline that has a group without attention besides those of guidance."""
    parts = copy.deepcopy(template).components
    return StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid", requires_safety_checker=False)


GROUPS = {
    "one, edit": (edit_pipe, {"guidance_scale": 1.0}, 1),
    "three, edit": (edit_pipe, {"image_guidance_scale": 1.5}, 3),
    "one, perturbed": (perturbed_pipe, {"guidance_scale": 1.0, "pag_scale": 0.0}, 1),
    "two, plain": (perturbed_pipe, {"pag_scale": 0.0}, 2),
    "two, perturbed": (perturbed_pipe, {"guidance_scale": 1.0, "pag_scale": 2.0}, 2),
    "three, perturbed": (perturbed_pipe, {"pag_scale": 2.0}, 3),
}


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("kind", GROUPS)
def test_any_number_of_guidance_groups(pipe_template, kind, images):
    make, options, groups = GROUPS[kind]
    pipe = make(pipe_template)
    pipe.set_progress_bar_config(disable=True)
    add(pipe, "spatial", CONCEPTS["spatial"])
    add(pipe, "separable", CONCEPTS["separable"], ("unet", "text_encoder"), seed=1)
    rows = ["spatial", None, {"separable": 0.7}]
    latents = noise(3 * images)
    pictures = torch.rand(3 * images, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def draw_some(prompts, which, **more):
        more |= {"image": pictures[which]} if make is edit_pipe else {}
        return draw(pipe, prompts, latents[which], **options, **more)

    expected = []
    for number, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=False)):
        atomdiff.set_active(pipe, {} if row is None else row)
        for one in range(number * images, (number + 1) * images):
            expected.append(draw_some([prompt], slice(one, one + 1)))
    atomdiff.restore(pipe)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    before = sorted(vars(pipe))
    with atomdiff.mixed_batch(pipe, rows):
        mixed = draw_some(PROMPTS[:3], slice(None), num_images_per_prompt=images)
    assert set(sizes) == {groups * 3 * images} and sorted(vars(pipe)) == before
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)


def test_a_pipeline_keeps_its_own_way_to_make_latents(pipe):
    calls = []
    pipe.prepare_latents = own = lambda *args, make=pipe.prepare_latents: calls.append(1) or make(*args)
    with atomdiff.mixed_batch(pipe, ["spatial", None]):
        draw(pipe, PROMPTS[:2], noise(2))
    assert calls and pipe.prepare_latents is own


def test_a_pipeline_that_shares_the_models_mixes_as_the_one_that_mixed_batch_was_given(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = ["spatial", {"separable": {"steps": {0: 0, 1: 2}}}]

    def redraw(prompts, which, **options):
        generator = [torch.Generator().manual_seed(number) for number in range(2)][which]
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", "strength": 0.5} | options
        return other(prompts, pictures[which], generator=generator, **options).images

    for scale in (3.0, 1.0):
        expected = []
        for number, row in enumerate(rows):
            atomdiff.set_active(pipe, row)
            expected.append(redraw(PROMPTS[number : number + 1], slice(number, number + 1), guidance_scale=scale))
        atomdiff.restore(pipe)
        with atomdiff.mixed_batch(pipe, rows):
            mixed = redraw(PROMPTS[:2], slice(None), guidance_scale=scale)
        torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)
        assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_a_schedule_follows_the_scheduler_of_the_pipeline_that_draws(pipe):
    other = type(pipe).from_pipe(pipe, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        write = switch._Writer.__call__
        patch.setattr(
            switch._Writer, "__call__", lambda self, share, **o: (shares.append(share), write(self, share, **o))[1]
        )
        atomdiff.set_active(pipe, {"spatial": {"steps": {0: 1, 1: 0}}})
        shares.clear()
        draw(pipe, PROMPTS[:1], noise(1), num_inference_steps=2)
        draw(other, PROMPTS[:1], noise(1), num_inference_steps=3)
    assert shares == [0.0, 1.0, 0.0, 0.5, 1.0]
    atomdiff.restore(other)
    assert "_atomdiff_schedule" not in vars(pipe.unet)
