"""Pipelines with concepts, for the tests of all modules of `atomdiff.pipelines`."""

import copy

import pytest
import torch

import atomdiff
from tests.helpers import add_adapter
from tests.pipelines.helpers import METHODS, VARIANTS, train


@pytest.fixture(scope="session")
def concepts(pipe_template, tmp_path_factory):
    """A saved concept of every method: two of atoms, one with the text encoder; some with a word."""
    folder, files = tmp_path_factory.mktemp("concepts"), {}
    words = {"atoms": "sks", "dct atoms": "ohwx", "lora": "zwx"}
    for seed, method in enumerate(METHODS):
        pipe = copy.deepcopy(pipe_template)
        parts = ("unet", "text_encoder") if method in ("atoms", "loha") else ("unet",)
        train(pipe, method, word=words.get(method), seed=seed, parts=parts)
        name = f"{method.replace(' ', '_')}{'.atoms.safetensors' if 'atoms' in method else ''}"
        files[method] = atomdiff.save_atoms(pipe, folder / name, dtype=torch.float32, trigger_phrase="a mug")
    return files


@pytest.fixture(scope="session")
def variants_template(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    for seed, (name, config) in enumerate(VARIANTS.items()):
        parts = ("unet", "text_encoder") if name in ("separable", "dct") else ("unet",)
        add_adapter(pipe, name, config, parts, seed)
    return pipe


@pytest.fixture
def pipe(variants_template):
    """A pipeline with a concept of every variant of atoms, two of them also in the text encoder."""
    return copy.deepcopy(variants_template)
