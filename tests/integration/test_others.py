"""Others act between our calls: diffusers' own calls leave nothing behind that unloading does not put right."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict

import atomdiff
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_token,
    add_placeholder_tokens,
    remove_placeholder_tokens,
    set_token_embedding,
)
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.utils.errors import UserError

pytestmark = pytest.mark.slow

CONCEPTS = {
    "mug": (AtomConfig(channel_block=4, target_modules=["conv1", "conv_in", "to_q", "q_proj"]), "ohwx"),
    "cat": (AtomConfig(channel_block=2, basis="dct", target_modules="attention"), "zwx"),
    "style": (LoraConfig(r=2, target_modules=["to_q", "conv1", "q_proj"]), None),
}


def add(pipe, config, name="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for model in (pipe.unet, pipe.text_encoder):
        model.add_adapter(copy.deepcopy(config), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(f".{name}") or f".{name}." in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 20)


@pytest.fixture(scope="module")
def files(pipe_template, tmp_path_factory):
    """Two concepts of atoms with a word each, and a LoRA; all of UNet and text encoder."""
    folder, saved = tmp_path_factory.mktemp("concepts"), {}
    for seed, (name, (config, word)) in enumerate(CONCEPTS.items()):
        pipe = copy.deepcopy(pipe_template)
        if word:
            add_placeholder_token(pipe, word)
            set_token_embedding(pipe, word, {"text_encoder": torch.full((32,), float(seed + 1))})
        add(pipe, config, seed=seed)
        saved[name] = atomdiff.save_atoms(pipe, folder / name, dtype=torch.float32)
    return saved


def bits(pipe):
    return {
        f"{part}.{key}": value.detach().clone()
        for part, model in pipeline_models(pipe).items()
        for key, value in [*model.state_dict().items(), *model.named_buffers()]
    }


def layout(pipe):
    """All that can be seen of a pipeline besides its weights."""
    models = pipeline_models(pipe)
    return {
        "modules": {
            part: [(path, type(module)) for path, module in model.named_modules()] for part, model in models.items()
        },
        "attributes": {part: set(vars(model)) - {"lora_scale", "_safe_fusing"} for part, model in models.items()},
        "config": pipe.text_encoder.config.to_dict(),
        "vocabulary": pipe.tokenizer.get_vocab(),
        "tokens": pipe.tokenizer.tokenize("a photo of ohwx zwx mug"),
    }


def predict(pipe, prompt="a photo of ohwx mug"):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, 5, pipe.encode_prompt(prompt, "cpu", 1, False)[0]).sample


def assert_same(now, before):
    assert now.keys() == before.keys()
    assert [key for key, value in before.items() if not torch.equal(now[key], value)] == []


PARTS = ["unet", "text_encoder"]
THEIRS = {
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "fuse_lora": lambda pipe: pipe.fuse_lora(components=PARTS),
    "fuse and unload": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.unload_lora_weights()),
    "unfuse_lora": lambda pipe: pipe.unfuse_lora(components=PARTS),
    "fuse and unfuse": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.unfuse_lora(components=PARTS)),
    "delete the atoms": lambda pipe: pipe.delete_adapters("mug"),
    "delete all": lambda pipe: pipe.delete_adapters(["mug", "style"]),
    "fuse and delete": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.delete_adapters(["mug", "style"])),
    "disable_lora": lambda pipe: (pipe.disable_lora(), predict(pipe)),
    "unload_textual_inversion": lambda pipe: pipe.unload_textual_inversion(),
    "unload_lora of the UNet": lambda pipe: pipe.unet.unload_lora(),
}


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("order", [("mug",), ("mug", "style"), ("style", "mug")], ids="-".join)
@pytest.mark.parametrize("merged", [True, False])
def test_unloading_is_exact_whatever_others_did(tiny_pipe, files, theirs, order, merged):
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    for name in order:
        atomdiff.load_atoms(tiny_pipe, files[name], name)
    if merged:
        atomdiff.set_active(tiny_pipe, dict.fromkeys(order, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "mug" in order or "style" in order:
            try:
                THEIRS[theirs](tiny_pipe)
            except ValueError:  # of diffusers: there is nothing to delete
                pytest.skip("diffusers refuses it")
    atomdiff.restore(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(bits(tiny_pipe), before)
    assert layout(tiny_pipe) == seen


def test_a_name_whose_layers_are_gone_is_free(tiny_pipe, files):
    atomdiff.load_atoms(tiny_pipe, files["mug"], "x")
    expected = predict(tiny_pipe)
    tiny_pipe.unload_lora_weights()
    assert [(c.name, c.layers) for c in atomdiff.list_atoms(tiny_pipe)] == [("x", {})]  # the word is still there
    atomdiff.load_atoms(tiny_pipe, files["mug"], "x")
    assert torch.equal(predict(tiny_pipe), expected)
    tiny_pipe.delete_adapters("x")
    atomdiff.load_atoms(tiny_pipe, files["cat"], "x")
    assert [(c.name, c.trigger_words) for c in atomdiff.list_atoms(tiny_pipe)] == [("x", ("zwx",))]


def shared(pipe, *own):
    """Another pipeline of the same components, but for copies of those named."""
    parts = {name: copy.deepcopy(part) if name in own else part for name, part in pipe.components.items()}
    return type(pipe)(**parts, requires_safety_checker=False)


@pytest.mark.parametrize("own", [(), ("unet",), ("tokenizer",), ("tokenizer", "unet")], ids="-".join)
@pytest.mark.parametrize("first_out", ["mug", "cat"])
def test_pipelines_that_share_a_text_encoder_know_each_others_words(tiny_pipe, files, own, first_out):
    one, two = tiny_pipe, shared(tiny_pipe, *own)
    before, seen, others = bits(one), layout(one), (bits(two), layout(two))
    lone = {}
    for name, (_, word) in list(CONCEPTS.items())[:2]:
        atomdiff.load_atoms(one, files[name], name)
        lone[word] = one.encode_prompt(f"a {word} mug", "cpu", 1, False)[0] if name == "mug" else None
        atomdiff.unload_atoms(one)
    atomdiff.load_atoms(one, files["mug"], "mug")
    atomdiff.load_atoms(two, files["cat"], "cat")
    ids = [[pipe.tokenizer.encode(word, add_special_tokens=False) for word in ("ohwx", "zwx")] for pipe in (one, two)]
    assert ids[0] == ids[1] and all(len(each) == 1 for each in ids[0]) and ids[0][0] != ids[0][1]
    table = one.text_encoder.get_input_embeddings().weight
    assert (table[ids[0][0][0]] == 1).all() and (table[ids[0][1][0]] == 2).all()
    with pytest.raises(UserError, match="'ohwx' is taken by 'mug'"):
        atomdiff.load_atoms(two, files["mug"], "another")
    for name in (first_out, {"mug": "cat", "cat": "mug"}[first_out]):
        atomdiff.unload_atoms(one if name == "mug" else two, name)
    assert_same(bits(one), before)
    assert_same(bits(two), others[0])
    assert layout(one) == seen and layout(two) == others[1]


def test_unloading_all_leaves_the_words_of_other_pipelines(tiny_pipe, pipe_template, tmp_path):
    source, path = copy.deepcopy(pipe_template), {}
    for seed, word in enumerate(("ohwx", "zwx")):
        source.unet.add_adapter(AtomConfig(target_modules="attention"), word)
        add_placeholder_token(source, word)
        set_token_embedding(source, word, {"text_encoder": torch.full((32,), float(seed + 1))})
        path[word] = atomdiff.save_atoms(source, tmp_path / word, word)
        atomdiff.unload_atoms(source)
    one, two = tiny_pipe, shared(tiny_pipe, "unet")
    before = bits(one), layout(one)
    for pipe, word in ((one, "ohwx"), (two, "zwx")):
        atomdiff.load_atoms(pipe, path[word], word)
    drawn = predict(two, "a zwx mug")
    atomdiff.unload_atoms(one)
    assert torch.equal(predict(two, "a zwx mug"), drawn)
    assert "ohwx" not in two.tokenizer.get_vocab()
    atomdiff.unload_atoms(two)
    assert_same(bits(one), before[0])
    assert layout(one) == before[1]


def test_a_concept_that_came_before_a_component_was_exchanged(tiny_pipe, files):
    before, fresh = (
        layout(tiny_pipe),
        {part: copy.deepcopy(getattr(tiny_pipe, part)) for part in ("text_encoder", "tokenizer")},
    )
    old = {part: getattr(tiny_pipe, part) for part in fresh}
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    for part, model in fresh.items():
        setattr(tiny_pipe, part, model)
        atomdiff.list_atoms(tiny_pipe)
    assert tiny_pipe.tokenizer.tokenize("ohwx") == ["ohwx"]
    assert (tiny_pipe.text_encoder.get_input_embeddings().weight[-1] == 1).all()
    atomdiff.unload_atoms(tiny_pipe)
    now = layout(tiny_pipe)
    assert now == before
    for part, model in old.items():
        setattr(tiny_pipe, part, model)
    atomdiff.unload_atoms(tiny_pipe)
    assert layout(tiny_pipe) == before


def several_vectors(pipe, word="mu"):
    add_placeholder_tokens(pipe, placeholder_tokens(word, 2))
    for number, each in enumerate(placeholder_tokens(word, 2)):
        set_token_embedding(pipe, each, {"text_encoder": torch.full((32,), number + 1.0)})


def embeds(pipe, prompt):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


WORD_PROMPTS = ["a mu mug", "a MU cat", "mu mug_mu xmu, mu", "a mug"]


@pytest.mark.parametrize("first", [True, False], ids=["made before", "made after"])
@pytest.mark.parametrize("own", [(), ("unet",), ("text_encoder",)], ids="-".join)
def test_a_pipeline_that_no_call_touched_knows_the_words_of_its_parts(tiny_pipe, own, first):
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    early = shared(tiny_pipe, *own)
    plain, others, theirs = embeds(early, "a mug"), bits(early), layout(early)
    if own == ("text_encoder",):
        fresh = copy.deepcopy(tiny_pipe.text_encoder)
    several_vectors(tiny_pipe)
    expected = [embeds(tiny_pipe, prompt) for prompt in WORD_PROMPTS]
    if first:
        other = early
    elif own == ("text_encoder",):
        other = type(tiny_pipe)(**tiny_pipe.components | {"text_encoder": fresh}, requires_safety_checker=False)
    else:
        other = StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipe)
    for prompt, embedded in zip(WORD_PROMPTS, expected, strict=True):
        assert torch.equal(embeds(other, prompt), embedded), prompt
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    assert torch.equal(embeds(other, "a mug"), plain)
    for pipe, weights, attributes in ((tiny_pipe, before, seen), (early, others, theirs)):
        assert_same(bits(pipe), weights)
        assert layout(pipe) == attributes


def test_a_tokenizer_that_takes_a_word_of_its_text_encoder_apart_is_told(tiny_pipe):
    other = shared(tiny_pipe, "tokenizer")
    before, seen = bits(other), layout(other)
    several_vectors(tiny_pipe)
    assert torch.equal(embeds(other, "a red cat"), embeds(tiny_pipe, "a red cat"))
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    several_vectors(tiny_pipe)
    with pytest.raises(UserError, match="did not know the trigger word 'mu' of its text encoder.*call again"):
        embeds(other, ["a cat", "a mu cat"])
    for prompt in WORD_PROMPTS:
        assert torch.equal(embeds(other, prompt), embeds(tiny_pipe, prompt)), prompt
    remove_placeholder_tokens(other, placeholder_tokens("mu", 2))
    assert_same(bits(other), before)
    assert layout(other) == seen


def test_a_text_encoder_that_was_exchanged_learns_the_words_as_it_is_called(tiny_pipe):
    fresh = copy.deepcopy(tiny_pipe.text_encoder)
    before = copy.deepcopy(fresh.state_dict())
    several_vectors(tiny_pipe)
    expected = embeds(tiny_pipe, "a mu mug")
    tiny_pipe.text_encoder = fresh
    assert torch.equal(embeds(tiny_pipe, "a mu mug"), expected)
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert not fresh._forward_pre_hooks


def test_parts_of_pipelines_with_different_words_are_refused_together(tiny_pipe, pipe_template, files):
    other = copy.deepcopy(pipe_template)
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    atomdiff.load_atoms(other, files["cat"], "cat")
    mixed = type(other)(**{**other.components, "tokenizer": tiny_pipe.tokenizer}, requires_safety_checker=False)
    with pytest.raises(UserError, match="know different trigger words, 'zwx' and 'ohwx'"):
        atomdiff.load_atoms(mixed, files["style"], "style")


def nested(weights):
    return [{"unet": weights, "text_encoder": 1.0}]


@pytest.mark.parametrize(
    "weights", [{"down": 0.5, "mid": 0, "up": 1}, {"down": {"block_1": 0.3}}, {"up": {"block_0": [0.2, 0.6]}}]
)
def test_nested_blocks_mean_the_same_in_set_adapters_and_set_active(tiny_pipe, files, weights):
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    full = predict(tiny_pipe)
    tiny_pipe.set_adapters(["mug"], nested(weights))
    theirs = predict(tiny_pipe)
    atomdiff.set_active(tiny_pipe, {"mug": {"blocks": weights}})
    torch.testing.assert_close(predict(tiny_pipe), theirs, atol=1e-5, rtol=0)
    assert (theirs - full).abs().max() > 1e-4
    with pytest.raises(UserError, match="no layer in 'down_blocks.7'"):
        tiny_pipe.set_adapters(["mug"], nested({"down": {"block_7": 1}}))


def test_the_other_calls_of_diffusers_work(tiny_pipe, files):
    for name in ("mug", "cat"):
        atomdiff.load_atoms(tiny_pipe, files[name], name)
    drawn = predict(tiny_pipe)
    assert tiny_pipe.get_active_adapters() == ["cat"]
    assert tiny_pipe.get_list_adapters() == dict.fromkeys(PARTS, ["mug", "cat"])
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomLayer, "_move_adapter_to_device_of_base_layer", lambda *args: moved.append(args[1:]))
        tiny_pipe.set_lora_device(["mug"], "meta")
    assert set(moved) == {("mug", torch.device("meta"))}
    tiny_pipe.set_lora_device(["mug", "cat"], "cpu")
    assert torch.equal(predict(tiny_pipe), drawn)
    with pytest.raises(UserError, match="fuse_qkv_projections copies weights that concepts adapt"):
        tiny_pipe.fuse_qkv_projections(vae=False)


@pytest.mark.parametrize("merged", [True, False])
def test_saving_a_pipeline_with_concepts_writes_the_base(tiny_pipe, files, tmp_path, merged):
    tiny_pipe.save_pretrained(tmp_path / "before")
    for name in ("mug", "style"):
        atomdiff.load_atoms(tiny_pipe, files[name], name)
    if merged:
        atomdiff.set_active(tiny_pipe, ["mug", "style"])
    drawn, loaded = predict(tiny_pipe), bits(tiny_pipe)
    with pytest.warns(UserWarning, match="base only, not the concepts that are loaded .'mug', 'style'"):
        tiny_pipe.save_pretrained(tmp_path / "after")
    written = {path.relative_to(tmp_path / "before"): path for path in (tmp_path / "before").rglob("*.*")}
    assert [
        str(path) for path, file in written.items() if file.read_bytes() != (tmp_path / "after" / path).read_bytes()
    ] == []
    assert torch.equal(predict(tiny_pipe), drawn)
    assert_same(bits(tiny_pipe), loaded)
    atomdiff.unload_atoms(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_pipe.save_pretrained(tmp_path / "again")


def test_fused_and_unloaded_concepts_are_saved_as_a_lora_is(tiny_pipe, files, tmp_path):
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    tiny_pipe.fuse_lora(components=PARTS)
    tiny_pipe.unload_lora_weights()
    drawn = predict(tiny_pipe, "a mug")
    tiny_pipe.unet.save_pretrained(tmp_path)
    tiny_pipe.unet = type(tiny_pipe.unet).from_pretrained(tmp_path)
    assert torch.equal(predict(tiny_pipe, "a mug"), drawn)


NAMES = st.sampled_from(["mug", "cat", "style"])
SOME = st.dictionaries(NAMES, st.sampled_from([1.0, 0.5, -0.3]), max_size=3)
OUR_CALLS = {"load": NAMES, "unload": NAMES, "set_active": SOME, "mixed": NAMES}
OUR_CALLS |= {"merge": st.none(), "restore": st.none()}
CALLS_OF_OTHERS = {
    "set_adapters": SOME,
    "fuse_lora": st.none(),
    "unfuse_lora": st.none(),
    "disable_lora": st.none(),
    "enable_lora": st.none(),
    "delete_adapters": NAMES,
    "unload_lora_weights": st.none(),
    "unload_textual_inversion": st.none(),
}
STEPS = st.one_of(
    *(st.tuples(st.just(call), st.integers(0, 1), value) for call, value in (OUR_CALLS | CALLS_OF_OTHERS).items()),
    st.tuples(st.just("load"), st.integers(0, 1), NAMES),
)


def act(pipe, paths, call, value):
    """One call; what it refuses is an error in one line."""
    loaded = {concept.name for concept in atomdiff.list_atoms(pipe)}
    adapters = {name for names in pipe.get_list_adapters().values() for name in names}
    if call == "load":
        atomdiff.load_atoms(pipe, paths[value], value)
    elif call == "unload":
        atomdiff.unload_atoms(pipe, value)
    elif call == "set_active":
        atomdiff.set_active(pipe, {name: weight for name, weight in value.items() if name in loaded})
    elif call == "mixed":
        with atomdiff.mixed_batch(pipe, [value]):
            predict(pipe)
    elif call in ("merge", "restore"):
        getattr(atomdiff, call)(pipe)
    elif call in ("fuse_lora", "unfuse_lora"):
        getattr(pipe, call)(components=PARTS)
    elif call == "set_adapters":
        if chosen := {name: weight for name, weight in value.items() if name in adapters}:
            pipe.set_adapters(list(chosen), list(chosen.values()))
    elif call == "delete_adapters":
        pipe.delete_adapters(value)
    elif call == "unload_textual_inversion":
        if pipe.tokenizer.added_tokens_encoder.keys() & {"ohwx", "zwx"}:
            pipe.unload_textual_inversion()
    else:
        getattr(pipe, call)()


def run(template, paths, steps, own):
    pipes = [copy.deepcopy(template)]
    pipes.append(shared(pipes[0], *own))
    before = [(bits(pipe), layout(pipe)) for pipe in pipes]
    drawn = [predict(pipe, "a mug") for pipe in pipes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, which, value in steps:
            try:
                act(pipes[which], paths, call, value)
            except UserError as error:
                assert "\n" not in str(error)
            assert torch.isfinite(predict(pipes[which], "a ohwx zwx mug")).all()
        for pipe in pipes:
            atomdiff.restore(pipe)
            atomdiff.set_active(pipe, {})
            table = pipe.text_encoder.get_input_embeddings().weight
            assert table.shape[0] >= len(pipe.tokenizer)
        assert all(torch.equal(predict(pipe, "a mug"), base) for pipe, base in zip(pipes, drawn, strict=True))
        for pipe in pipes:
            atomdiff.unload_atoms(pipe)
    for pipe, (weights, seen) in zip(pipes, before, strict=True):
        assert_same(bits(pipe), weights)
        assert layout(pipe) == seen


@given(steps=st.lists(STEPS, min_size=1, max_size=8), own=st.sampled_from([(), ("unet",), ("tokenizer",)]))
@example(
    steps=[
        ("load", 0, "mug"),
        ("load", 1, "style"),
        ("set_active", 1, {"mug": 1.0, "style": 0.5}),
        ("delete_adapters", 0, "mug"),
        ("unload_lora_weights", 0, None),
    ],
    own=(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_after_any_sequence_every_bit_is_back(pipe_template, files, steps, own):
    run(pipe_template, files, steps, own)


def test_copies_and_pickles_have_words_and_calls_of_their_own(tiny_pipe, files):
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    for name in ("mug", "style"):
        atomdiff.load_atoms(tiny_pipe, files[name], name)
    atomdiff.set_active(tiny_pipe, {"mug": {"steps": {0: 1, 1: 0.5}}, "style": 0.5})
    drawn, loaded = predict(tiny_pipe), bits(tiny_pipe)
    for twin in (copy.deepcopy(tiny_pipe), pickle.loads(pickle.dumps(tiny_pipe))):
        assert torch.equal(predict(twin), drawn)
        twin.fuse_lora(components=PARTS)
        twin.unload_lora_weights()
        atomdiff.unload_atoms(twin)
        assert_same(bits(twin), before)
        assert layout(twin) == seen
        assert_same(bits(tiny_pipe), loaded)
        assert torch.equal(predict(tiny_pipe), drawn)


def test_a_lora_that_diffusers_loaded_and_fused_comes_off_with_the_concept_below_it(tiny_pipe, pipe_template, files):
    before, made = bits(tiny_pipe), copy.deepcopy(pipe_template)
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    tensors = {f"unet.{key}": value for key, value in get_peft_model_state_dict(made.unet).items()}
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    tiny_pipe.load_lora_weights(tensors, adapter_name="lora")
    tiny_pipe.set_adapters(["mug", "lora"])
    drawn = predict(tiny_pipe)
    tiny_pipe.fuse_lora(components=PARTS)
    torch.testing.assert_close(predict(tiny_pipe), drawn, atol=1e-5, rtol=0)
    tiny_pipe.delete_adapters("mug")
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(bits(tiny_pipe), before)


IMAGE_CALLS = st.tuples(
    st.sampled_from(["load", "unload", "set_active", "set_adapters", "merge", "restore", "mixed"]),
    st.integers(0, 1),
    NAMES,
    SOME,
)


def expected_after(state, call, name, value):
    """What acts after a call, {adapter: weight}, kept in a state of adapters, their weights, and what is written."""
    if call == "load":
        state["weights"][name], state["active"], state["written"] = 1.0, {name}, None
    elif call == "unload":
        del state["weights"][name]
        state["active"], state["written"] = state["active"] - {name}, None
    elif call in ("set_active", "set_adapters"):
        state["weights"].update(value)
        state["active"], state["written"] = set(value), dict(value) if call == "set_active" else None
    elif call == "merge":
        state["written"] = {each: state["weights"][each] for each in state["active"]}
    elif call == "restore":
        state["written"] = None
    active = {each: state["weights"][each] for each in state["active"]}
    return active if state["written"] is None else state["written"]


@given(calls=st.lists(IMAGE_CALLS, min_size=2, max_size=8))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_every_image_in_between_is_that_of_a_fresh_pipeline(pipe_template, files, calls):
    one = copy.deepcopy(pipe_template)
    pipes, state = [one, shared(one)], {"weights": {}, "active": set(), "written": None}
    for call, which, name, value in [("load", 0, "mug", {}), *calls]:
        value = {each: weight for each, weight in value.items() if each in state["weights"]}
        if (name in state["weights"]) == (call == "load") or (call == "mixed" and name == "style"):
            continue
        if call == "set_adapters":
            if not value:
                continue
            atomdiff.restore(pipes[which])
        if call != "mixed":
            act(pipes[which], files, call, value if call in ("set_active", "set_adapters") else name)
        acting = {name: 1.0} if call == "mixed" else expected_after(state, call, name, value)
        fresh = copy.deepcopy(pipe_template)
        for each in state["weights"]:
            atomdiff.load_atoms(fresh, files[each], each)
        atomdiff.set_active(fresh, acting)
        others = "style" in (state["active"] if state["written"] is None else state["written"])
        if call == "mixed" and others:
            continue  # it is refused
        with atomdiff.mixed_batch(one, [name]) if call == "mixed" else nullcontext():
            found = predict(one, "a OHWX zwx mug")
        torch.testing.assert_close(found, predict(fresh, "a OHWX zwx mug"), atol=1e-4, rtol=0)


def test_adapters_that_are_added_beside_concepts_come_off_again(tiny_pipe, files):
    before = bits(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, files["mug"], "mug")
    with pytest.raises(UserError, match="bias='all' trains biases"):
        tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], bias="all"), "biased")
    add(tiny_pipe, LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False), "own")
    tiny_pipe.fuse_lora(components=PARTS)
    atomdiff.unload_atoms(tiny_pipe)
    tiny_pipe.unload_lora_weights()
    assert_same(bits(tiny_pipe), before)
