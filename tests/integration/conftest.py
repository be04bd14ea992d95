"""Concepts that the tests of this folder load."""

import copy

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig
from tests.helpers import add_adapter

CONCEPTS = {
    "mug": (AtomConfig(channel_block=4, target_modules=["conv1", "conv_in", "to_q", "q_proj"]), "ohwx"),
    "cat": (AtomConfig(channel_block=2, basis="dct", target_modules="attention"), "zwx"),
    "style": (LoraConfig(r=2, target_modules=["to_q", "conv1", "q_proj"]), None),
}


@pytest.fixture(scope="session")
def concept_files(pipe_template, tmp_path_factory):
    """Atoms of UNet and text encoder with a word each ("mug" with ohwx, "cat" with zwx), and such a LoRA ("style")."""
    folder, files = tmp_path_factory.mktemp("concepts"), {}
    for seed, (name, (config, word)) in enumerate(CONCEPTS.items()):
        pipe = copy.deepcopy(pipe_template)
        if word:
            add_placeholder_token(pipe, word)
            set_token_embedding(pipe, word, {"text_encoder": torch.full((32,), float(seed + 1))})
        add_adapter(pipe, "default", config, ("unet", "text_encoder"), seed, scale=0.05)
        files[name] = atomdiff.save_atoms(pipe, folder / name, dtype=torch.float32)
    return files


KINDS = {
    "default": AtomConfig(channel_block=4, target_modules=["conv_in", "conv1", "to_q"]),
    "dct": AtomConfig(channel_block=2, basis="dct", target_modules="attention"),
    "joint": AtomConfig(channel_block=2, joint=True, num_atoms=4, target_modules=["conv_in", "conv_out"]),
    "recursive": AtomConfig(channel_block=1, recursion=2, target_modules=["conv_in"]),
    "sparse": AtomConfig(channel_block=1, basis="sparse", num_atoms=12, target_modules=["conv_in"]),
}


@pytest.fixture(scope="session")
def valid_files(pipe_template, tmp_path_factory):
    """The bytes of a file of every kind of concept, some in float16, one with a word and a text encoder."""
    folder, files = tmp_path_factory.mktemp("valid"), {}
    for seed, (name, config) in enumerate(KINDS.items()):
        pipe = copy.deepcopy(pipe_template)
        add_adapter(pipe, "made", config, seed=seed, scale=0.05)
        if name == "default":
            text_config = AtomConfig(channel_block=4, target_modules=["q_proj"])
            add_adapter(pipe, "made", text_config, ["text_encoder"], seed, scale=0.05)
            add_placeholder_token(pipe, "sks")
            set_token_embedding(pipe, "sks", {"text_encoder": torch.arange(32) / 32})
        dtype = torch.float32 if seed % 2 else torch.float16
        files[name] = atomdiff.save_atoms(pipe, folder / name, "made", dtype=dtype).read_bytes()
    return files


@pytest.fixture(scope="session")
def valid_folder(pipe_template, tmp_path_factory):
    """A LoRA with a word, as PEFT and we write it: name of the file -> bytes."""
    pipe = copy.deepcopy(pipe_template)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}), "made")
    add_placeholder_token(pipe, "ohwx")
    set_token_embedding(pipe, "ohwx", {"text_encoder": torch.ones(32)})
    folder = atomdiff.save_atoms(pipe, tmp_path_factory.mktemp("lora"), "made")
    return {file.name: file.read_bytes() for file in folder.glob("*.*")}
