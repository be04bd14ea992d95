"""Engines on the tiny pipeline, with a library of concepts that are all called "sks mug"."""

import pytest

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.serving.engine import Engine
from tests.sampling.helpers import write_concept
from tests.tiny_models import fresh_copy


@pytest.fixture(scope="session")
def concept_files(pipe_template, tmp_path_factory):
    """A folder with three concepts; tests use copies."""
    folder, pipe = tmp_path_factory.mktemp("concepts"), fresh_copy(pipe_template, requires_safety_checker=False)
    for number, name in enumerate(("ant", "bee", "cat")):
        write_concept(pipe, folder / f"{name}.atoms.safetensors", number)
    return folder


@pytest.fixture
def library(concept_files, tmp_path):
    """A library of three concepts."""
    folder = tmp_path / "library"
    folder.mkdir()
    for file in concept_files.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def make_engine(tiny_pipe, library):
    """Makes an engine with that library, which is closed in the end."""
    engines = []

    def make(pipe=tiny_pipe, **options):
        engines.append(Engine(pipe, ServedConcepts(ConceptLibrary(library)), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(timeout=0)
