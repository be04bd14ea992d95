"""Switching concepts in place: pictures are the unmerged ones', weights stay where they are, every bit comes back."""

import copy
import itertools
import pickle
import random

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.testing import CompileCounter

import atomdiff
from atomdiff.concepts.concept_file import read_delta_file
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.adapter_state import atom_layers
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
SETS = [
    *({name: 1.0} for name in CONCEPTS),
    {"spatial": 0.4, "separable": -0.7},
    {"joint": 0.5, "sparse": 1.3, "recursive": -1.0},
    dict.fromkeys(CONCEPTS, 0.3),
]
BYTE = torch.uint8


def randomize(model, name, seed=0, scale=0.08):
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.endswith(f".{name}") or f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def add(pipe, name, config, parts=("unet",), seed=0):
    for part in parts:
        model = getattr(pipe, part)
        model.add_adapter(copy.deepcopy(config), name)
        randomize(model, name, seed)


@pytest.fixture(scope="module")
def loaded(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    for seed, (name, config) in enumerate(CONCEPTS.items()):
        add(pipe, name, config, ("unet", "text_encoder") if name in ("separable", "dct") else ("unet",), seed)
    pipe.disable_lora()
    pipe.enable_lora()
    return pipe


@pytest.fixture
def pipe(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def files(pipe_template, tmp_path_factory):
    """Two concepts of atoms, one with a word and a part in the text encoder, and a LoRA."""
    folder, saved = tmp_path_factory.mktemp("concepts"), {}
    lora = LoraConfig(r=2, target_modules=["to_q", "conv1"])
    for seed, (name, config) in enumerate({**CONCEPTS, "lora": lora}.items()):
        if name in ("separable", "spatial", "lora"):
            pipe = copy.deepcopy(pipe_template)
            add(pipe, "x", config, ("unet", "text_encoder") if name == "separable" else ("unet",), seed)
            if name == "separable":
                add_placeholder_token(pipe, "ohwx")
                set_token_embedding(pipe, "ohwx", {"text_encoder": torch.ones(32)})
            saved[name] = atomdiff.save_atoms(pipe, folder / name, "x", dtype=torch.float32)
    return saved


def draw(pipe, **options):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(pipe.unet.dtype)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0} | options
    return pipe("a photo of a mug", latents=noise, output_type="latent", **options).images


def predict(pipe, timestep=500):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(pipe.unet.dtype)
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2)).to(pipe.unet.dtype)
    with torch.no_grad():
        return pipe.unet(noise, torch.tensor(timestep), text).sample


def wear_unmerged(pipe, weights):
    atomdiff.restore(pipe)
    for model in (pipe.unet, pipe.text_encoder):
        for layer in atom_layers(model).values():
            layer.set_adapter(list(weights))
            for name, weight in weights.items():
                layer.set_scale(name, weight)


def bits(pipe):
    """All parameters and buffers of the base by their own names, as bytes."""
    return {
        f"{part}.{key.replace('.base_layer', '')}": value.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(BYTE)
        for part, model in pipeline_models(pipe).items()
        for key, value in model.state_dict().items()
        if "atom_" not in key and "lora_" not in key
    }


def assert_same(now, before):
    assert now.keys() == before.keys()
    assert [key for key in before if not torch.equal(now[key], before[key])] == []


def places(pipe):
    return [
        (id(p), p.data_ptr()) for p in itertools.chain(pipe.unet.parameters(), pipe.text_encoder.encoder.parameters())
    ]


def state(pipe):
    layers = [layer for m in pipeline_models(pipe).values() for layer in atom_layers(m).values()]
    scaling = [(layer.active_adapters, layer.disable_adapters, dict(layer.scaling)) for layer in layers]
    return bits(pipe), scaling, "_atomdiff_schedule" in vars(pipe.unet)


@pytest.mark.parametrize("weights", SETS, ids=lambda weights: "+".join(weights))
def test_pictures_are_those_of_unmerged_concepts(pipe, weights):
    base = draw(pipe) if list(weights) == ["spatial"] else None
    wear_unmerged(pipe, weights)
    expected = draw(pipe)
    atomdiff.set_active(pipe, weights)
    assert all(layer.holds_merged for layer in atom_layers(pipe.unet).values())
    torch.testing.assert_close(draw(pipe), expected, atol=1e-5, rtol=0)
    atomdiff.set_active(pipe, {})
    assert (draw(pipe) - expected).abs().max() > 1e-3
    assert base is None or not torch.equal(base, expected)


def test_a_name_names_and_a_mapping_mean_the_same(pipe):
    results = []
    for concepts in ("joint", ["joint"], ("joint",), {"joint": 1}, {"joint": {"weight": 1.0}}):
        atomdiff.set_active(pipe, "dct")
        atomdiff.set_active(pipe, concepts)
        results.append(bits(pipe))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)]
)
def test_fifty_switches_leave_no_trace(pipe, dtype, channels_last):
    for model in (pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(model, dtype)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
    before, where, rng = bits(pipe), places(pipe), random.Random(0)
    strides = [p.stride() for p in pipe.unet.parameters()]
    atomdiff.set_active(pipe, SETS[-1])
    first = bits(pipe)
    for step in range(50):
        chosen = rng.sample(list(CONCEPTS), rng.randrange(4))
        weights = {name: rng.choice([0, 1, -0.5, {"blocks": {"unet": rng.random()}}]) for name in chosen}
        atomdiff.set_active(pipe, weights, offload_base=rng.choice(["device", "cpu", None]))
        assert not weights or step % 10 or places(pipe) == where
    atomdiff.set_active(pipe, {})
    assert_same(bits(pipe), before)
    atomdiff.set_active(pipe, SETS[-1])
    assert_same(bits(pipe), first)
    assert places(pipe) == where and [p.stride() for p in pipe.unet.parameters()] == strides
    atomdiff.restore(pipe)
    assert_same(bits(pipe), before)
    assert places(pipe) == where


def live(pipe, files, folder, rng):
    """One random step in the life of a pipeline; returns its name."""
    names = [concept.name for concept in atomdiff.list_atoms(pipe)]
    atoms = [name for name in names if name != "lora"]
    some = {name: rng.choice([0.0, 0.6, -1.0]) for name in names if rng.random() < 0.6}
    place = rng.choice([None, "device", "cpu", "file"])
    action = rng.choice("load load unload switch switch switch schedule mix merge restore weights disable fail".split())
    if action == "load" and (missing := [name for name in files if name not in names]):
        atomdiff.load_atoms(pipe, files[missing[0]], missing[0])
    elif action == "unload" and names:
        atomdiff.unload_atoms(pipe, rng.choice(names))
    elif action == "switch":
        atomdiff.set_active(pipe, some, offload_base=place)
    elif action == "schedule":
        scheduled = {name: {"weight": 0.7, "steps": {0: 1, 1: 0.2}} for name in atoms}
        atomdiff.set_active(pipe, {**some, **scheduled}, offload_base=place)
        draw(pipe)
    elif action == "mix":
        atomdiff.set_active(pipe, {name: weight for name, weight in some.items() if name in atoms}, offload_base=place)
        with atomdiff.mixed_batch(pipe, [rng.choice([*atoms, None])]):
            draw(pipe)
    elif action in ("merge", "restore"):
        getattr(atomdiff, action)(pipe)
    elif action == "weights" and names:
        pipe.unet.set_adapters(names, [rng.choice([0.0, 1.5]) for _ in names])
        predict(pipe)
    elif action == "disable":
        rng.choice([pipe.disable_lora, pipe.enable_lora])()
        predict(pipe)
    elif action == "fail":
        kept = state(pipe)
        with pytest.raises(UserError):
            atomdiff.load_atoms(pipe, folder, "bad")
        with pytest.raises(UserError):
            atomdiff.set_active(pipe, {**some, "nobody": 1.0}, offload_base=place)
        assert_same(state(pipe)[0], kept[0])
        assert state(pipe)[1:] == kept[1:]
    return action


@pytest.mark.parametrize("seed", range(6))
def test_after_any_life_every_bit_is_back(tiny_pipe_folder, files, tmp_path, seed):
    rng = random.Random(seed)
    dtype = [torch.float32, torch.float16, torch.bfloat16][seed % 3]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipe_folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if seed >= 3:
        pipe.unet.to(memory_format=torch.channels_last)
    before, where = bits(pipe), places(pipe)
    strides = [p.stride() for p in pipe.unet.parameters()]
    for _ in range(25):
        live(pipe, files, tmp_path, rng)
    atomdiff.restore(pipe)
    restored = bits(pipe)
    words = "text_encoder.embeddings.token_embedding.weight"  # longer by the trained word
    assert_same({k: v for k, v in restored.items() if k != words}, {k: v for k, v in before.items() if k != words})
    atomdiff.unload_atoms(pipe)
    assert_same(bits(pipe), before)
    assert places(pipe) == where and [p.stride() for p in pipe.unet.parameters()] == strides


def test_no_concept_is_the_bare_base_in_place(pipe):
    wear_unmerged(pipe, {})
    base = draw(pipe)
    atomdiff.set_active(pipe, {})
    assert torch.equal(draw(pipe), base)
    pipe.unet.set_adapters(["joint"], [1.0])  # without effect until the next switch
    assert torch.equal(draw(pipe), base)
    assert all(layer.holds_merged for layer in atom_layers(pipe.unet).values())
    atomdiff.restore(pipe)
    assert (draw(pipe) - base).abs().max() > 1e-3


def test_a_switch_follows_training(pipe):
    atomdiff.set_active(pipe, "separable")
    before = draw(pipe)
    randomize(pipe.unet, "separable", seed=9)
    assert torch.equal(draw(pipe), before)
    atomdiff.set_active(pipe, "separable")
    after = draw(pipe)
    assert (after - before).abs().max() > 1e-3
    wear_unmerged(pipe, {"separable": 1.0})
    torch.testing.assert_close(draw(pipe), after, atol=1e-5, rtol=0)


def test_listing_tells_what_is_in_the_weights(pipe):
    atomdiff.set_active(pipe, {"dct": 1.0, "joint": 0.0})
    assert [c.name for c in atomdiff.list_atoms(pipe) if c.active] == ["dct", "joint"]
    assert [c.name for c in atomdiff.list_atoms(pipe) if c.merged] == ["dct", "joint"]
    atomdiff.set_active(pipe, {})
    assert not any(c.active or c.merged for c in atomdiff.list_atoms(pipe))


def compile_in_place(pipe, counter):
    pipe.unet.compile(backend=counter, fullgraph=True)


def compile_by_wrapping(pipe, counter):
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)


@pytest.mark.parametrize("compiled", [compile_in_place, compile_by_wrapping])
def test_compiled_code_outlives_every_switch(pipe_template, compiled):
    torch._dynamo.reset()
    pipe = copy.deepcopy(pipe_template)
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    for seed, (name, config) in enumerate(CONCEPTS.items()):
        add(pipe, name, config, seed=seed)
    counter = CompileCounter()
    choices = [
        {},
        {"spatial": 1.0},
        {"spatial": 0.5, "dct": 2.0, "sparse": 1.0},
        {"joint": {"weight": 0.8, "blocks": {"down": 0.5, "up.0": 0}}},
        {},
        {"recursive": 1.0, "separable": 0.0},
        {"separable": {"steps": {0: 1, 1: 0.1}}},
    ]
    expected = []
    for concepts in choices:
        atomdiff.set_active(pipe, concepts)
        expected.append(predict(pipe))
    atomdiff.set_active(pipe, {})  # a model is compiled before there are steps to follow
    compiled(pipe, counter)
    predict(pipe)
    assert counter.frame_count == 1
    for concepts, picture in zip(choices, expected, strict=True):
        atomdiff.set_active(pipe, concepts, offload_base="cpu" if len(concepts) == 3 else None)
        torch.testing.assert_close(predict(pipe), picture, atol=1e-5, rtol=0)
    pipe.scheduler.set_timesteps(4)
    steps = [predict(pipe, step) for step in pipe.scheduler.timesteps]
    weight = pipe.unet.conv_in.base_layer.weight.clone()
    atomdiff.set_active(pipe, {"separable": 0.1})
    torch.testing.assert_close(pipe.unet.conv_in.base_layer.weight, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(predict(pipe, pipe.scheduler.timesteps[-1]), steps[-1], atol=1e-5, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_concepts_go_in_and_out_of_a_model_that_torch_compile_has_wrapped(pipe_template, tmp_path):
    torch._dynamo.reset()
    made, pipe = copy.deepcopy(pipe_template), copy.deepcopy(pipe_template)
    add(made, "made", AtomConfig())
    file = atomdiff.save_atoms(made, tmp_path / "made.atoms.safetensors", "made", dtype=torch.float32)
    base, expected = predict(pipe), predict(made)
    compile_by_wrapping(pipe, CompileCounter())
    name = atomdiff.load_atoms(pipe, file)
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)
    again = atomdiff.save_atoms(pipe, tmp_path / "again.atoms.safetensors", name, dtype=torch.float32)
    assert read_delta_file(again).layers.keys() == read_delta_file(file).layers.keys()
    atomdiff.unload_atoms(pipe)
    torch.testing.assert_close(predict(pipe), base, atol=1e-5, rtol=0)
    assert not any(isinstance(module, AtomLayer) for module in pipe.unet.modules())
    torch._dynamo.reset()


LORA = LoraConfig(r=2, target_modules=["to_q", "conv1", "conv_in"])


@pytest.mark.parametrize("other", [LORA, LoHaConfig(r=2, target_modules=["to_k", "conv1"])], ids=["lora", "loha"])
def test_other_methods_are_merged_beside_atoms_and_exactly_taken_off(pipe, other):
    before, where = bits(pipe), places(pipe)
    add(pipe, "other", other, seed=5)
    where = places(pipe)
    atomdiff.set_active(pipe, {"spatial": 0.5, "other": 0.7})
    assert places(pipe) == where
    both, merged = draw(pipe), bits(pipe)
    atomdiff.set_active(pipe, "spatial")
    only = draw(pipe)
    assert (both - only).abs().max() > 1e-3
    atomdiff.set_active(pipe, {"other": 0.7, "spatial": 0.5})
    assert_same(bits(pipe), merged)
    atomdiff.set_active(pipe, {})
    assert_same({key: value for key, value in bits(pipe).items() if key in before}, before)
    atomdiff.restore(pipe)
    pipe.unet.set_adapters(["spatial", "other"], [0.5, 0.7])
    for layer in atom_layers(pipe.text_encoder).values():
        layer.set_adapter([])
    torch.testing.assert_close(draw(pipe), both, atol=2e-5, rtol=0)
    assert places(pipe) == where


def test_another_method_stays_on_while_a_schedule_rewrites_the_atoms_below(pipe):
    add(pipe, "lora", LORA, seed=5)
    pipe.scheduler.set_timesteps(3)
    first, last = pipe.scheduler.timesteps[[0, -1]]
    atomdiff.set_active(pipe, {"spatial": 0.25, "lora": 1.0})
    expected = predict(pipe, last)
    before = bits(pipe)
    atomdiff.set_active(pipe, {"spatial": {"steps": {0: 1, 1: 0.25}}, "lora": 1.0})
    predict(pipe, first)
    assert torch.equal(predict(pipe, last), expected)
    assert_same(bits(pipe), before)


@pytest.mark.parametrize(
    "other", [OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]), IA3Config(target_modules=["to_k"])]
)
def test_methods_without_a_weight_are_worn_at_one_or_refused(pipe, recwarn, other, user_warnings):
    other.feedforward_modules = []
    add(pipe, "other", other, seed=5)
    recwarn.clear()
    atomdiff.set_active(pipe, ["spatial", "other"])
    kept = state(pipe)
    with pytest.raises(UserError, match=r"'other' is a \w+ adapter, which PEFT gives no weight such as 0.5: use 1"):
        atomdiff.set_active(pipe, {"joint": 1.0, "other": 0.5})
    assert_same(state(pipe)[0], kept[0])
    assert state(pipe)[1:] == kept[1:] and not user_warnings(recwarn)


def test_the_weight_of_another_method_is_only_tried_out(pipe):
    add(pipe, "lora", LORA, seed=5)
    add(pipe, "oft", OFTConfig(r=2, oft_block_size=0, target_modules=["to_v"]), seed=5)
    wear_unmerged(pipe, {})
    pipe.unet.set_adapter(["lora"])
    before = predict(pipe)
    with pytest.raises(UserError, match="'oft' is a OFT"):
        atomdiff.set_active(pipe, {"lora": 0.3, "oft": 0.5})
    assert torch.equal(predict(pipe), before)


def test_concepts_of_words_only_are_switched_too(tiny_pipe, files, tmp_path):
    add_placeholder_token(tiny_pipe, "zwx")
    set_token_embedding(tiny_pipe, "zwx", {"text_encoder": torch.ones(32)})
    atomdiff.save_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.unload_atoms(tiny_pipe)
    before = bits(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.set_active(tiny_pipe, {"word": 0.5}, offload_base="file")  # there is nothing to keep
    atomdiff.set_active(tiny_pipe, {"word": {"steps": {0: 1, 1: 0}}})
    draw(tiny_pipe)
    with pytest.raises(UserError, match="'word' has no layer in 'down_blocks'; it has layers in: none"):
        atomdiff.set_active(tiny_pipe, {"word": {"blocks": {"down": 0.5}}})
    atomdiff.load_atoms(tiny_pipe, files["spatial"], "spatial")
    atomdiff.set_active(tiny_pipe, ["word", "spatial"])
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(bits(tiny_pipe), before)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("nobody", "there is no concept 'nobody'; loaded are: 'separable', 'dct', 'spatial', 'joint'"),
        ({"joint": 1.0, "": 1.0}, "there is no concept ''; loaded are"),
        ({"joint": float("nan")}, r"found the adapter weight .*weight=nan.*give a number.*finite"),
        ({"joint": float("inf")}, "finite"),
        ({"joint": 10**400}, "finite"),
        ({"joint": "much"}, "found the adapter weight 'much': give a number"),
        ({"joint": None}, "found the adapter weight None: give a number"),
        ({"joint": True}, "found the adapter weight"),
        ({"joint": {"weight": "1"}}, "found the adapter weight"),
        (
            {"dct": {"blocks": {"down.0": 1}}},
            "'dct' has no layer in 'down_blocks.0'; it has layers in: .*unet.mid_block",
        ),
        ({"joint": {"blocks": {"conv_i": 1}}}, "no layer in 'conv_i'"),
        ({"joint": {"wieght": 1}}, "no layer in 'wieght'"),
        ({"joint": {"steps": {1.5: 1}}}, "expected shares of the denoising steps, from 0 to 1"),
        ({"joint": {"steps": [1, 2]}}, r"found steps=\[1, 2\]"),
        ({"lora": {"steps": {0: 1}}}, "'lora' is no atom concept"),
        ({"lora": {"blocks": {"down": 1}}}, "'lora' has no layer|'lora' is no atom concept"),
        (None, "found the concepts None: give their names"),
        ([["joint"]], r"found the concepts \[\['joint'\]\]: give their names"),
        (7, "found the concepts 7"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(pipe, concepts, message):
    add(pipe, "lora", LORA)
    atomdiff.set_active(pipe, {"dct": {"steps": {0: 1, 1: 0}}})
    kept = state(pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.set_active(pipe, concepts)
    assert_same(state(pipe)[0], kept[0])
    assert state(pipe)[1:] == kept[1:]


def test_a_switch_looks_at_the_chosen_concepts_only(pipe, monkeypatch):
    calls = []
    update, set_adapter = AtomLayer._weight_update, BaseTunerLayer.set_adapter
    monkeypatch.setattr(AtomLayer, "_weight_update", lambda self, *args: calls.append(args[0]) or update(self, *args))
    monkeypatch.setattr(
        BaseTunerLayer, "set_adapter", lambda *args, **kw: calls.append("all") or set_adapter(*args, **kw)
    )
    atomdiff.set_active(pipe, ["joint", "recursive"])
    layers = atom_layers(pipe.unet).values()
    expected = [name for name in ("joint", "recursive") for layer in layers if name in layer.scaling]
    assert sorted(calls) == sorted(expected)


def test_copies_and_pickles_live_their_own_lives(pipe):
    atomdiff.set_active(pipe, {"separable": {"steps": {0: 1, 1: 0}}, "joint": 0.5}, offload_base="cpu")
    before, expected = bits(pipe), draw(copy.deepcopy(pipe))
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(draw(twin), expected)
        assert not torch.equal(bits(twin)["unet.conv_in.weight"], before["unet.conv_in.weight"])
        assert_same(bits(pipe), before)
        atomdiff.set_active(twin, "dct")
        atomdiff.restore(twin)
        assert_same(bits(pipe), before)
    assert torch.equal(draw(pipe), expected)
