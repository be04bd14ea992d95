"""Engines on the tiny pipeline, with a library of concepts that are all called "sks mug"."""

import threading
import time
from contextlib import ExitStack

import httpx
import pytest

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.serving.app import make_app
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.serving.config import ServeConfig
from atomdiff.serving.engine import Engine
from atomdiff.serving.http_server import HttpServer
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


@pytest.fixture
def serve(make_engine, tiny_pipe_folder, library):
    """Starts a server; gives a client of it."""
    with ExitStack() as undo:

        def start(engine=None, headers=None, **options):
            config = ServeConfig(pretrained_model_name_or_path=str(tiny_pipe_folder), library=str(library), **options)
            engine = engine or make_engine(max_queue=config.max_queue, timeout=config.request_timeout)
            server = HttpServer(make_app(engine, config), config, port=0, log_level="critical")
            thread = threading.Thread(target=server.run)
            thread.start()
            undo.callback(thread.join)
            undo.callback(setattr, server, "should_exit", True)
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers)
            client.server, client.engine = server, engine
            return undo.enter_context(client)

        yield start
