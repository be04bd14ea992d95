"""Concepts in a pipeline: what comes in goes out again, exactly, and what does not fit does not come in."""

import copy
import json
import resource
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import GloraConfig, HiraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import read_delta_file
from atomdiff.concepts.modelspec import model_spec
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding, tokens_in
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.adapter_state import adapter_layers, peft_tensors
from atomdiff.utils.errors import UserError

METHODS = {
    "atoms": lambda: AtomConfig(channel_block=4),
    "dct atoms": lambda: AtomConfig(channel_block=2, basis="dct", target_modules="attention"),
    "joint atoms": lambda: AtomConfig(channel_block=2, joint=True, num_atoms=4),
    "recursive atoms": lambda: AtomConfig(recursion=2, basis="dct", target_modules=["conv1", "to_v"]),
    "sparse atoms": lambda: AtomConfig(basis="sparse", channel_block=1, num_atoms=12, target_modules=["conv_in"]),
    "lora": lambda: LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]),
    "loha": lambda: LoHaConfig(r=2, target_modules=["to_k", "conv2"]),
    "oft": lambda: OFTConfig(r=2, oft_block_size=0, target_modules=["to_q", "to_v"]),
    "ia3": lambda: IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
}


def train(pipe, method="atoms", name="default", word=None, seed=0, parts=("unet",)):
    """Add an adapter with random numbers, and a word, as a training run leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        model = getattr(pipe, part)
        config = METHODS[method]()
        if part == "text_encoder":
            config.target_modules = ["q_proj", "v_proj"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(config, name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(f".{name}") or f".{name}." in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 20)
    if word:
        add_placeholder_token(pipe, word)
        set_token_embedding(pipe, word, {"text_encoder": torch.randn(32, generator=generator)})


@pytest.fixture(scope="module")
def concepts(pipe_template, tmp_path_factory):
    """A concept of every method, saved exactly: two of atoms, one with the text encoder; some with a word."""
    folder = tmp_path_factory.mktemp("concepts")
    saved = {}
    words = {"atoms": "sks", "dct atoms": "ohwx", "lora": "zwx"}
    for seed, method in enumerate(METHODS):
        pipe = copy.deepcopy(pipe_template)
        parts = ("unet", "text_encoder") if method in ("atoms", "loha") else ("unet",)
        train(pipe, method, word=words.get(method), seed=seed, parts=parts)
        name = f"{method.replace(' ', '_')}{'.atoms.safetensors' if 'atoms' in method else ''}"
        saved[method] = atomdiff.save_atoms(pipe, folder / name, dtype=torch.float32, trigger_phrase="a mug")
    return saved


def picture(pipe, prompt="a photo of sks mug"):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    with torch.no_grad():
        text = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        return pipe.unet(noise, 5, text).sample


def bits(pipe):
    return {
        f"{part}.{key}": value.detach().clone()
        for part, model in pipeline_models(pipe).items()
        for key, value in model.state_dict().items()
    }


def layout(pipe):
    """All that can be seen of a pipeline besides its weights."""
    models = pipeline_models(pipe)
    return {
        "modules": {part: [(n, type(m)) for n, m in model.named_modules()] for part, model in models.items()},
        "trainable": {part: [p.requires_grad for p in model.parameters()] for part, model in models.items()},
        "layers": {
            part: [
                (m.active_adapters, m.disable_adapters, list(m.merged_adapters), dict(getattr(m, "scaling", {})))
                for m in model.modules()
                if isinstance(m, BaseTunerLayer)
            ]
            for part, model in models.items()
        },
        "adapters": pipe.get_list_adapters(),
        "attributes": {part: sorted(vars(model)) for part, model in models.items()},
        "words": list(tokens_in(pipe)),
        "tokenizer": id(pipe.tokenizer),
    }


def assert_same(now, before):
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())


def test_saved_is_loaded_is_merged(tiny_pipe, tmp_path):
    train(tiny_pipe, word="ohwx", parts=("unet", "text_encoder"))
    trained = picture(tiny_pipe, "a photo of ohwx mug")
    path = tmp_path / "my mug.v2.atoms.safetensors"
    assert atomdiff.save_atoms(tiny_pipe, path, dtype=torch.float32) == path
    atomdiff.unload_atoms(tiny_pipe)
    base = picture(tiny_pipe, "a photo of ohwx mug")
    assert atomdiff.load_atoms(tiny_pipe, path) == "my_mug"
    assert torch.equal(picture(tiny_pipe, "a photo of ohwx mug"), trained)
    atomdiff.merge(tiny_pipe)
    assert torch.equal(picture(tiny_pipe, "a photo of ohwx mug"), trained)
    assert (trained - base).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_saved_and_loaded_with_its_word(tiny_pipe, tmp_path, method):
    parts = ("unet",) if method == "recursive atoms" else ("unet", "text_encoder")  # recursion takes kernels
    train(tiny_pipe, method, name="made", word="ohwx", parts=parts)
    trained = picture(tiny_pipe, "a photo of ohwx mug")
    atomdiff.save_atoms(tiny_pipe, tmp_path / "concept", "made", dtype=torch.float32)
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "concept", "again")
    torch.testing.assert_close(picture(tiny_pipe, "a photo of ohwx mug"), trained, atol=1e-6, rtol=0)
    listed = atomdiff.list_atoms(tiny_pipe)
    assert [(c.name, c.active, c.merged, c.trigger_words) for c in listed] == [("again", True, False, ("ohwx",))]
    assert set(listed[0].layers) == set(parts) and listed[0].method == METHODS[method]().peft_type


@pytest.mark.parametrize("method", METHODS)
def test_loading_and_unloading_are_exact_inverses(tiny_pipe, concepts, method):
    before, seen, drawn = bits(tiny_pipe), layout(tiny_pipe), picture(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, concepts[method], "x")
    assert (picture(tiny_pipe) - drawn).abs().max() > 1e-4
    atomdiff.unload_atoms(tiny_pipe, "x")
    assert_same(bits(tiny_pipe), before)
    assert layout(tiny_pipe) == seen
    assert torch.equal(picture(tiny_pipe), drawn)


def test_half_precision_files_are_small_and_close(tiny_pipe, tmp_path):
    train(tiny_pipe)
    trained = picture(tiny_pipe)
    atomdiff.save_atoms(tiny_pipe, tmp_path / "x")
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "x")
    torch.testing.assert_close(picture(tiny_pipe), trained, atol=5e-3, rtol=0)
    with safe_open(tmp_path / "x", "pt") as file:
        numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert (tmp_path / "x").stat().st_size < 2 * numbers + 60_000


def test_saved_again_the_file_is_the_same(tiny_pipe, concepts, tmp_path):
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "default")
    atomdiff.merge(tiny_pipe)  # the fingerprint is that of the untouched weights all the same
    atomdiff.save_atoms(tiny_pipe, tmp_path / "atoms.atoms.safetensors", dtype=torch.float32, trigger_phrase="a mug")
    with safe_open(concepts["atoms"], "pt") as one, safe_open(tmp_path / "atoms.atoms.safetensors", "pt") as two:
        first, second = one.metadata(), two.metadata()
        assert first.pop("modelspec.date")[:2] == second.pop("modelspec.date")[:2] == "20"
        assert first == second
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k)) for k in one.keys())  # noqa: SIM118


def test_peft_directories_are_the_same_bytes_each_time(tiny_pipe, tmp_path):
    train(tiny_pipe, "lora", word="ohwx")
    for name in "abcdefgh":
        atomdiff.save_atoms(tiny_pipe, tmp_path / name, training={"steps": 3})
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abcdefgh"]
    assert all(each == files[0] for each in files) and len(files[0]) == 3
    assert list(load_file(tmp_path / "a" / "learned_embeds.safetensors")) == ["token.ohwx"]
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["to_q", "to_v", "conv1"]
    )


def test_the_file_says_what_it_is(tiny_pipe, concepts):
    delta = read_delta_file(concepts["atoms"])
    assert delta.trigger_phrase == "a mug" and list(delta.tokens) == ["sks"]
    assert {module.partition(".")[0] for module in delta.layers} == {"unet", "text_encoder"}
    assert delta.modelspec["architecture"] == "stable-diffusion/atoms" and delta.modelspec["resolution"] == "32x32"
    assert delta.modelspec["prediction_type"] == "v" and delta.modelspec["title"] == "atoms"


def test_the_date_can_be_given_so_that_files_are_the_same_bytes(tiny_pipe, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert model_spec(tiny_pipe, "mug")["date"] == "2023-11-14T22:13:20+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="'yesterday': expected whole seconds"):
        model_spec(tiny_pipe, "mug")


def test_diffusers_own_calls_work(tiny_pipe, concepts):
    base = picture(tiny_pipe)
    one, two = (
        atomdiff.load_atoms(tiny_pipe, concepts[method], trigger_word=word)
        for method, word in (("atoms", "sks"), ("dct atoms", "zwx"))
    )
    second = picture(tiny_pipe)
    tiny_pipe.set_adapters([one, two], [0.0, 1.0])
    assert torch.equal(picture(tiny_pipe), second)
    tiny_pipe.set_adapters([one, two], [1.0, 0.5])
    both = picture(tiny_pipe)
    assert (both - second).abs().max() > 1e-3
    assert [(c.name, c.active) for c in atomdiff.list_atoms(tiny_pipe)] == [(one, True), (two, True)]
    tiny_pipe.fuse_lora(components=["unet", "text_encoder"])
    torch.testing.assert_close(picture(tiny_pipe), both, atol=1e-5, rtol=0)
    tiny_pipe.unfuse_lora(components=["unet", "text_encoder"])
    tiny_pipe.disable_lora()
    table = tiny_pipe.text_encoder.get_input_embeddings().weight
    assert not torch.equal(picture(tiny_pipe), both) and not any(c.active for c in atomdiff.list_atoms(tiny_pipe))
    tiny_pipe.enable_lora()
    assert torch.equal(picture(tiny_pipe), both)
    tiny_pipe.delete_adapters(one)
    atomdiff.unload_atoms(tiny_pipe)
    assert torch.equal(picture(tiny_pipe), base) and table is tiny_pipe.text_encoder.get_input_embeddings().weight


def test_merging_again_follows_the_weights(tiny_pipe, concepts):
    name = atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    atomdiff.merge(tiny_pipe)
    full = picture(tiny_pipe)
    tiny_pipe.set_adapters(name, 0.5)
    assert torch.equal(picture(tiny_pipe), full)
    atomdiff.merge(tiny_pipe)
    half = picture(tiny_pipe)
    atomdiff.restore(tiny_pipe)
    torch.testing.assert_close(picture(tiny_pipe), half, atol=1e-5, rtol=0)
    assert (half - full).abs().max() > 1e-3


@pytest.mark.parametrize("other", ["lora", "oft", "loha"])
def test_atoms_and_other_methods_are_worn_and_merged_together(tiny_pipe, concepts, other):
    before = bits(tiny_pipe)
    for order in (("atoms", other), (other, "atoms")):
        names = [atomdiff.load_atoms(tiny_pipe, concepts[method]) for method in order]
        for model in (tiny_pipe.unet, tiny_pipe.text_encoder):
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.set_adapter(names)
        together = picture(tiny_pipe)
        atomdiff.merge(tiny_pipe)
        torch.testing.assert_close(picture(tiny_pipe), together, atol=2e-5, rtol=0)
        atomdiff.restore(tiny_pipe)
        assert torch.equal(picture(tiny_pipe), together)
        atomdiff.merge(tiny_pipe)
        atomdiff.unload_atoms(tiny_pipe)
        assert_same(bits(tiny_pipe), before)


def live(pipe, files, action, name, weight):
    """One step in the life of a pipeline."""
    loaded = [concept.name for concept in atomdiff.list_atoms(pipe)]
    if action == "load" and name not in loaded:
        atomdiff.load_atoms(pipe, files[name], name)
    elif action == "unload" and name in loaded:
        atomdiff.unload_atoms(pipe, name)
    elif action == "weights":
        for layer in adapter_layers(pipe.unet).values():
            layer.set_adapter(loaded)
            if isinstance(layer, AtomLayer):
                layer.set_scale(name, weight)
    elif action == "disable":
        pipe.disable_lora()
    elif action in ("merge", "restore"):
        getattr(atomdiff, action)(pipe)


ACTIONS = st.tuples(
    st.sampled_from(["load", "load", "load", "weights", "weights", "merge", "merge", "restore", "unload", "disable"]),
    st.sampled_from(["atoms", "dct_atoms", "lora", "oft"]),
    st.sampled_from([0.0, 0.3, -1.5]),
)


@given(steps=st.lists(ACTIONS, min_size=1, max_size=10), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(max_examples=25, deadline=None)
@example(steps=[("load", "lora", 0.0), ("merge", "", 0.0), ("load", "atoms", 0.0)], dtype="float32")
def test_after_any_life_every_bit_is_back(pipe_template, concepts, steps, dtype):
    pipe = copy.deepcopy(pipe_template)
    for model in pipeline_models(pipe).values():
        torch.nn.Module.to(model, getattr(torch, dtype))
    before, seen = bits(pipe), layout(pipe)
    for step in steps:
        live(pipe, {method.replace(" ", "_"): path for method, path in concepts.items()}, *step)
    atomdiff.restore(pipe)
    restored = {key.replace(".base_layer", ""): value for key, value in bits(pipe).items()}
    words = "text_encoder.embeddings.token_embedding.weight"
    assert words in before
    assert_same({key: restored[key] for key in before if key != words}, {k: v for k, v in before.items() if k != words})
    atomdiff.unload_atoms(pipe)
    assert_same(bits(pipe), before)
    assert layout(pipe) == seen


def rewrite(source, target, change=None, drop=(), metadata=None):
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key not in drop}  # noqa: SIM118
        save_file({**tensors, **(change or {})}, target, {**file.metadata(), **(metadata or {})})
    return target


BROKEN = {
    "missing": (lambda source, folder: folder / "nothing", "there is no file or directory"),
    "empty folder": (lambda source, folder: folder, "holds no concept"),
    "other layers": (
        lambda source, folder: rewrite(source, folder / "x", {"unet.nowhere.atom_delta": torch.zeros(9, 9)}),
        "not one list of numbers for each layer",
    ),
    "shape": (
        lambda source, folder: rewrite(source, folder / "x", {"unet.conv_in.atom_delta": torch.zeros(8, 9)}),
        "does not fit this base: unet.conv_in",
    ),
    "missing atoms": (
        lambda source, folder: rewrite(source, folder / "x", drop=["unet.conv_in.atom_basis"]),
        "does not fit this base: unet.conv_in",
    ),
    "not finite": (
        lambda source, folder: rewrite(
            source, folder / "x", {"unet.conv_in.atom_delta": torch.full((9, 9), torch.inf)}
        ),
        "unet.conv_in.atom_delta holds values",
    ),
    "version": (
        lambda source, folder: rewrite(source, folder / "x", metadata={"format_version": "9"}),
        "format version '9'",
    ),
    "token": (
        lambda source, folder: rewrite(source, folder / "x", {"token.sks": torch.zeros(33)}),
        r"embedding of 'sks' has shape \(33,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_failed_load_leaves_the_pipeline_as_it_was(tiny_pipe, concepts, tmp_path, case):
    make, message = BROKEN[case]
    atomdiff.load_atoms(tiny_pipe, concepts["dct atoms"], "there")
    atomdiff.merge(tiny_pipe)
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, make(concepts["atoms"], tmp_path), "new")
    assert_same(bits(tiny_pipe), before)
    assert layout(tiny_pipe) == seen


def break_lora(source, folder, tensors):
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    all_tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors(all_tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: dict(list(t.items())[1:]), "do not fit this model.*1 in all"),
        (lambda t: {**t, "base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, "do not fit.*nowhere"),
        (lambda t: {key: value[..., :1].contiguous() for key, value in t.items()}, "do not fit this model"),
        (lambda t: {key: value / 0 for key, value in t.items()}, "not finite"),
    ],
)
def test_a_failed_load_of_a_directory_too(tiny_pipe, concepts, tmp_path, tensors, message):
    names = [atomdiff.load_atoms(tiny_pipe, concepts[method]) for method in ("dct atoms", "lora")]
    tiny_pipe.unet.set_adapter(names)
    atomdiff.merge(tiny_pipe)
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, break_lora(concepts["lora"], tmp_path, tensors), "new")
    assert_same(bits(tiny_pipe), before)
    assert layout(tiny_pipe) == seen


HUGE = 10_000_000
ABSURD = {
    "lora": (lambda: LoraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "lora, less so": (lambda: LoraConfig(r=2, target_modules=["to_q"]), {"r": 10**6}, r"found \(2, .*\(1000000, "),
    "lora, here and there": (
        lambda: LoraConfig(r=2, target_modules=["to_q"]),
        {"rank_pattern": {"mid_block.*": HUGE}},
        "ask for a tensor",
    ),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["conv1"]), {"r": HUGE}, "ask for a tensor"),
    "hira": (lambda: HiraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "glora": (lambda: GloraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "atoms": (
        lambda: AtomConfig(basis="sparse", num_atoms=12, target_modules=["conv_in"]),
        {"num_atoms": 100 * HUGE},
        "ask for a tensor",
    ),
}


@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_rank_is_refused_before_it_takes_memory(tiny_pipe, tmp_path, case):
    make, absurd, message = ABSURD[case]
    adapter = copy.deepcopy(tiny_pipe.unet)
    adapter.add_adapter(make())
    peft_folder.write(tmp_path, {"unet": (make(), peft_tensors(adapter, "default"))}, {}, "unet")
    atomdiff.load_atoms(tiny_pipe, tmp_path, "good")
    before, seen = bits(tiny_pipe), layout(tiny_pipe)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | absurd))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"cannot load .*{message}"):
        atomdiff.load_atoms(tiny_pipe, tmp_path, "new")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 64 << 10  # in KB
    assert_same(bits(tiny_pipe), before)
    assert layout(tiny_pipe) == seen


def test_trying_an_adapter_out_leaves_nothing_behind(tiny_pipe, concepts, user_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        atomdiff.load_atoms(tiny_pipe, concepts["lora"], "x")
        drawn = torch.rand(1)
        atomdiff.unload_atoms(tiny_pipe, "x")
        torch.manual_seed(0)
        inject_adapter_in_model(METHODS["lora"](), tiny_pipe.unet, "x")
    assert torch.equal(torch.rand(1), drawn) and not user_warnings(caught)


def test_names_and_words_that_are_taken(tiny_pipe, concepts):
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    with pytest.raises(UserError, match="'atoms' is loaded already: choose another adapter_name"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "atoms")
    with pytest.raises(UserError, match="'sks' is taken by 'atoms'.*trigger_word="):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "second")
    for name in ("a.b", "keys", " ", "conv1", "0"):
        with pytest.raises(UserError, match="cannot be an adapter name"):
            atomdiff.load_atoms(tiny_pipe, concepts["atoms"], name)
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "second", trigger_word="other")
    assert [c.trigger_words for c in atomdiff.list_atoms(tiny_pipe)] == [("sks",), ("other",)]
    with pytest.raises(UserError, match="renames one word, but the concept has 0"):
        atomdiff.load_atoms(tiny_pipe, concepts["oft"], trigger_word="third")
    with pytest.raises(UserError, match="no concept 'cat' to unload; there are: 'atoms', 'second'"):
        atomdiff.unload_atoms(tiny_pipe, "cat")
    with pytest.raises(UserError, match="no concept 'cat' to save"):
        atomdiff.save_atoms(tiny_pipe, "x", "cat")


def test_the_base_is_recognised(tiny_pipe, concepts, user_warnings):
    def move(amount):
        generator = torch.Generator().manual_seed(0)
        for parameter in tiny_pipe.unet.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += amount * parameter.data.std() * noise

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.Module.to(tiny_pipe.unet, torch.bfloat16)
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
        atomdiff.unload_atoms(tiny_pipe)
        torch.nn.Module.to(tiny_pipe.unet, torch.float32)
    move(0.2)
    with pytest.warns(UserWarning, match=r"distance 0.0\d+ from .*may look different") as caught:
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    (warning,) = user_warnings(caught)
    assert warning.filename == __file__
    atomdiff.unload_atoms(tiny_pipe)
    move(3)
    with pytest.raises(UserError, match=r"distance 0.\d+ from .*allow_base_mismatch=True"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    assert not atomdiff.list_atoms(tiny_pipe)
    with pytest.warns(UserWarning, match="may look different"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], allow_base_mismatch=True)


def test_components_with_different_atoms_are_not_saved_in_one_file(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(channel_block=4, target_modules="attention"))
    tiny_pipe.text_encoder.add_adapter(AtomConfig(channel_block=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="other atoms in text_encoder than in unet|other atoms in unet than in text"):
        atomdiff.save_atoms(tiny_pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_concept_may_be_a_word_only(tiny_pipe, tmp_path):
    before = bits(tiny_pipe)
    add_placeholder_token(tiny_pipe, "ohwx")
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    atomdiff.save_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(bits(tiny_pipe), before)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "word.safetensors")
    assert [(c.name, c.method, c.trigger_words) for c in atomdiff.list_atoms(tiny_pipe)] == [("word", "", ("ohwx",))]
    assert (tiny_pipe.text_encoder.get_input_embeddings().weight[-1] == 1).all()
    atomdiff.unload_atoms(tiny_pipe, "word")
    assert_same(bits(tiny_pipe), before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' rewrites the base"),
        ("modules_to_save", ["conv_in"], "replaces whole modules"),
        ("trainable_token_indices", [1], "replaces rows of embeddings"),
        ("bias", "all", "bias='all' trains biases of the base"),
        ("bias", "lora_only", "bias='lora_only' trains biases of the base"),
        ("peft_type", "NO_SUCH", "cannot read .*adapter_config.json"),
    ],
)
def test_directories_that_cannot_be_taken_out_again_are_refused(tiny_pipe, concepts, tmp_path, field, value, message):
    for file in concepts["lora"].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, tmp_path, "x")
    assert not atomdiff.list_atoms(tiny_pipe)


V_ZERO_SNR = {"config": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}


@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_loading_warns_of_a_scheduler_that_does_not_draw_as_trained(tiny_pipe, tmp_path, method, user_warnings):
    train(tiny_pipe, method, word="ohwx")
    path = tmp_path / "mug.atoms.safetensors"
    atomdiff.save_atoms(tiny_pipe, path, training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    before = tiny_pipe.scheduler
    with pytest.warns(UserWarning) as caught:
        atomdiff.load_atoms(tiny_pipe, path, "mug")
    (warning,) = user_warnings(caught)
    assert warning.filename == __file__ and tiny_pipe.scheduler is before
    told, line = str(warning.message).split("; run\n")
    assert (
        "'mug' was trained for a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=True" in told
    )
    assert "the pipeline has a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False" in told
    exec(line, {"pipe": tiny_pipe})
    assert tiny_pipe.scheduler.alphas_cumprod[-1] == 0 and tiny_pipe.scheduler.config.timestep_spacing == "trailing"
    atomdiff.unload_atoms(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atomdiff.load_atoms(tiny_pipe, path, "mug")


@pytest.mark.parametrize("shift", [10**400, 1e-320, 1e308])
def test_a_shift_that_cannot_be_is_no_shift(tiny_pipe, tmp_path, shift):
    train(tiny_pipe)
    facts = {"config": {"prediction_type": "flow", "flow_shift": shift}}
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=facts)
    atomdiff.unload_atoms(tiny_pipe)
    with pytest.warns(UserWarning, match="was trained for a .* with prediction_type=flow, flow_shift=1.0"):
        atomdiff.load_atoms(tiny_pipe, path)


def test_a_warning_of_the_scheduler_that_is_an_error_leaves_the_pipeline_as_it_was(tiny_pipe, tmp_path):
    train(tiny_pipe, word="ohwx")
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    before = bits(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was trained for"):
            atomdiff.load_atoms(tiny_pipe, path)
    assert not atomdiff.list_atoms(tiny_pipe)
    assert_same(bits(tiny_pipe), before)


def test_a_concept_loads_whatever_the_scheduler(tiny_pipe, tmp_path):
    train(tiny_pipe)
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.warns(UserWarning, match="'mug' was trained with another scheduler .*FlowMatchEuler.*no noise sched"):
        atomdiff.load_atoms(tiny_pipe, path)
    tiny_pipe.scheduler = None
    atomdiff.load_atoms(tiny_pipe, read_delta_file(path), "again")
    assert [concept.name for concept in atomdiff.list_atoms(tiny_pipe)] == ["mug", "again"]
