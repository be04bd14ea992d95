"""A small sampling job, and a library of concepts for it."""

import pytest

from atomdiff.pipelines import open as opening
from atomdiff.sampling.config import SampleConfig
from tests.sampling.helpers import QUICK, write_concept


@pytest.fixture
def config(tiny_pipe_folder, tmp_path):
    return SampleConfig(
        str(tiny_pipe_folder), str(tmp_path / "out"), prompts=("a red mug", "a blue cat"), seeds=(0, 5), **QUICK
    )


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a pipeline was loaded."""
    counted, load = [], opening.open_pipeline
    monkeypatch.setattr(opening, "open_pipeline", lambda *a, **k: counted.append(a) or load(*a, **k))
    return counted


@pytest.fixture
def library(tiny_pipe, tmp_path):
    """Five concepts that are all called "sks mug", in a folder and in one below it."""
    for number, name in enumerate(("ant", "bee", "cat", "dog", "pets/eel")):
        write_concept(tiny_pipe, tmp_path / "library" / f"{name}.atoms.safetensors", number)
    return tmp_path / "library"
