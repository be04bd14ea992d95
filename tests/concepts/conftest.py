"""Concepts of tiny pipelines in files and folders."""

import pytest
import torch

import atomdiff
from tests.concepts.library_files import Reads, write_concept
from tests.export.helpers import add_random_adapter
from tests.helpers import predict


@pytest.fixture
def concept(tiny_pipe, tmp_path):
    """A concept file beside nothing else, and what the UNet predicts with it."""
    add_random_adapter(tiny_pipe, word="sks")
    training = {"steps": 40, "seed": 0, "final_loss": 0.123456, "config": {"learning_rate": 0.005, "seed": 0}}
    file = tmp_path / "run" / "my mug.v2.atoms.safetensors"
    options = {"trigger_phrase": "sks mug", "training": training, "base_model": "someone/stable-diffusion"}
    atomdiff.save_atoms(tiny_pipe, file, dtype=torch.float32, **options)
    prediction = predict(tiny_pipe, "a photo of sks mug")
    atomdiff.unload_atoms(tiny_pipe)
    return file, prediction


@pytest.fixture
def lora(tiny_pipe, tmp_path):
    """The folder of a LoRA in UNet and text encoder with a trigger word, and what the UNet predicts with it."""
    add_random_adapter(tiny_pipe, "lora", word="sks")
    folder = atomdiff.save_atoms(tiny_pipe, tmp_path / "lora")
    prediction = predict(tiny_pipe, "a photo of sks mug")
    atomdiff.unload_atoms(tiny_pipe)
    return folder, prediction


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each concept file is read."""
    return Reads(monkeypatch, "read_concept_file")


@pytest.fixture
def headers(monkeypatch):
    """Counts how often each header is read."""
    return Reads(monkeypatch, "read_header")


@pytest.fixture
def three(tmp_path):
    """A folder with three concepts."""
    for number, name in enumerate(("ant", "bee", "cat")):
        write_concept(tmp_path, name, number, f"a photo of sks {name}")
    return tmp_path
