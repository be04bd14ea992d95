"""A server under load with faults: is each image right, and does anything grow?

    python -m benchmarks.serving_load

Clients ask for images with more concepts than stay loaded, each image to be the one that its request gives alone. Among
ten requests one is bad, one is of a client that leaves, and one replaces a concept that others use, and deletes it.
Server and clients are one process, whose figures are taken after warm-up and at the end of each part, without requests.
"""

from __future__ import annotations

import base64
import gc
import io
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.serving import write_concepts

GENERATE = "/v1/images/generations"
REPLACED = "replaced"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    base: str = "samples/toybox-sd"
    """The base model."""
    concepts: int = 80
    """Different concepts; 64 stay loaded."""
    warm_up: int = 500
    """Requests before the first look."""
    requests: int = 1000
    """Requests after it."""
    parts: int = 4
    """Looks after the first, evenly among the requests."""
    clients: int = 16
    """Requests at a time."""
    note: str = ""
    """What else the machine did."""
    output: str = "benchmarks/results/serving_load.json"
    """The result file."""


class Clients:
    """What clients ask a server for, and whether it was right.

    Args:
        client: of the server.
        engine: of the server.
        files: contents of the concepts c0, c1, ...; two of them take turns as the one that is replaced.
    """

    def __init__(self, client: Any, engine: Any, files: Sequence[bytes]) -> None:
        self.client, self.engine, self.files = client, engine, files
        self.outcomes: Counter[str] = Counter()
        self._expected = [self._image(self._ask(number)) for number in range(len(files))]  # alone
        self._replaced = [self._image(self._ask(0, name)) for name in ("c0", "c1")]

    def run(self, numbers: Sequence[int], clients: int) -> None:
        """Send requests, and wait until all of them are done with."""
        with ThreadPoolExecutor(clients) as pool:
            for outcome in pool.map(self._send, numbers):
                self.outcomes[outcome] += 1
        while self.engine.num_waiting or self.engine.num_running:
            time.sleep(0.05)

    def _send(self, number: int) -> str:
        """Send the request of a number, and return what came of it."""
        concept = random.Random(number).randrange(len(self.files))
        match number % 10:
            case 7:
                answer = self._bad(number)
                return "bad requests refused" if answer.status_code == 400 else self._unexpected(answer)
            case 8:
                return self._leave(concept)
            case 9:
                return self._replace(number)
        return self._compare(self._ask(concept), self._expected[concept : concept + 1])

    def _ask(self, concept: int, name: str = "", timeout: float = 300, **fields: Any) -> Any:
        prompt = f"a photo of sks mug <atoms:{name or f'c{concept}'}>"
        body = {"prompt": prompt, "steps": 1 + concept % 3, "seed": concept, "guidance_scale": 4.0, **fields}
        return self.client.post(GENERATE, json=body, timeout=timeout)

    def _bad(self, number: int) -> Any:
        kinds = ({"steps": 0}, {"prompt": "<atoms:nothing>"}, {"size": "33x32"}, {"concepts": {"c1": "much"}})
        if kind := (number // 10) % (len(kinds) + 1):
            return self._ask(0, **kinds[kind - 1])
        return self.client.post("/v1/concepts", files={"file": ("bad", self.files[0][:-9])})

    def _leave(self, concept: int) -> str:
        import httpx

        try:
            answer = self._ask(concept, steps=500, timeout=0.05)
        except httpx.TimeoutException:
            return "clients that left"
        return self._unexpected(answer)

    def _replace(self, number: int) -> str:
        contents = (number // 10) % 2
        file = {"file": (REPLACED, self.files[contents])}
        added = self.client.post("/v1/concepts", files=file, data={"overwrite": "true"})
        if added.status_code != 201:
            return self._unexpected(added)
        answer = self._ask(0, REPLACED)
        self.client.delete(f"/v1/concepts/{REPLACED}")
        if answer.status_code == 400 and "there is no concept" in answer.text:
            return "deleted before they were asked for"
        return self._compare(answer, self._replaced)

    def _compare(self, answer: Any, expected: Sequence[Any]) -> str:
        if answer.status_code != 200:
            return self._unexpected(answer)
        image = self._image(answer)
        return "right images" if any(abs(image - each).max() <= 1 for each in expected) else "wrong images"

    @staticmethod
    def _unexpected(answer: Any) -> str:
        return f"unexpected: {answer.status_code} {answer.text[:100]}"

    @staticmethod
    def _image(answer: Any) -> Any:
        import numpy as np
        from PIL import Image

        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def write_library(pipe: Any, folder: Path, count: int) -> list[bytes]:
    """Write concepts with random deltas and an embedding of "sks"; return their contents."""
    import torch

    from atomdiff.concepts.concept_file import read_concept_file, write_concept_file

    write_concepts(pipe, folder, count, channel_block=1)
    files = []
    for number in range(count):
        path = folder / f"c{number}.atoms.safetensors"
        vector = 0.05 * torch.randn(
            pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(number)
        )
        tokens = {"sks": {"text_encoder": vector}}
        write_concept_file(path, replace(read_concept_file(path), tokens=tokens, trigger_phrase="sks mug"))
        files.append(path.read_bytes())
    return files


@contextmanager
def running(config: BenchmarkConfig, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Make a `with` block in which a server runs; gives a client of it and its engine."""
    import httpx

    from atomdiff.serving.app import make_app
    from atomdiff.serving.config import ServeConfig
    from atomdiff.serving.http_server import HttpServer
    from atomdiff.serving.server import open_engine

    options = ServeConfig(pretrained_model_name_or_path=config.base, library=str(folder), dtype="float32")
    engine = open_engine(options)
    server = HttpServer(make_app(engine, options), options, port=0, log_level="critical")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client, engine
    finally:
        server.should_exit = True
        thread.join()


def look(engine: Any) -> dict[str, float]:
    """Return the figures that must not grow."""
    import psutil

    from atomdiff.pipelines.loaded_concepts import list_atoms

    gc.collect()
    process = psutil.Process()
    return {
        "resident_mb": round(process.memory_info().rss / 1e6, 1),
        "threads": process.num_threads(),
        "open_files": process.num_fds(),
        "loaded_adapters": len(list_atoms(engine.pipe)),
        "embedding_rows": engine.pipe.text_encoder.get_input_embeddings().num_embeddings,
    }


def measure(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Return all figures, with a library in an empty folder."""
    from atomdiff.pipelines.open import open_pipeline

    files = write_library(open_pipeline(config.base), folder, config.concepts)
    with running(config, folder) as (client, engine):
        clients = Clients(client, engine, files)
        clients.run(range(config.warm_up), config.clients)
        looks, started = [look(engine)], time.perf_counter()
        clients.outcomes.clear()
        size = config.requests // config.parts
        for part in range(config.parts):
            first = config.warm_up + part * size
            clients.run(range(first, first + size), config.clients)
            looks.append(look(engine))
            print(f"{(part + 1) * size} requests: {looks[-1]}", flush=True)
        seconds = time.perf_counter() - started
        growth = {
            name: round(1000 * (looks[-1][name] - looks[0][name]) / (size * config.parts), 2) for name in looks[0]
        }
        return {
            "requests": size * config.parts,
            "seconds": round(seconds, 1),
            "outcomes": dict(sorted(clients.outcomes.items())),
            "jobs": vars(engine.stats),
            "after warm-up": looks[0],
            "later": looks[1:],
            "growth per 1,000 requests": growth,
            "engine runs": engine.is_running,
        }


def main() -> None:
    """Measure, and write the result file."""
    config = parse_config(BenchmarkConfig, prog="python -m benchmarks.serving_load")
    quiet_libraries()
    command = command_line("serving_load", config, ("output", "note"))
    with tempfile.TemporaryDirectory() as folder:
        write_result(config.output, command, measure(config, Path(folder)), note=config.note)


if __name__ == "__main__":
    main()
