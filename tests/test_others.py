"""Others act between our calls: diffusers' own calls leave nothing behind that unloading does not put right."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.pipeline import add_trigger_word, pipeline_models, set_trigger_embedding
from atomdiff.tuner import AtomConfig

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
            add_trigger_word(pipe, word)
            set_trigger_embedding(pipe, word, {"text_encoder": torch.full((32,), float(seed + 1))})
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
