"""Servers on a Ray cluster: two replicas on this machine, with one library."""

import re
import shlex
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from atomdiff.serving.config import ReplicasConfig
from atomdiff.serving.ray_app import app, deployment_options
from atomdiff.utils.errors import UserError
from tests.serving.helpers import GENERATE, Alone, ask, message_of, pixels, pixels_of
from tests.tiny_models import fresh_copy


@pytest.fixture
def ray_serve():
    return pytest.importorskip("ray.serve", reason="needs the extra serve-ray", exc_type=ImportError)


@pytest.fixture
def client(ray_serve, monkeypatch):
    """A Ray cluster of two CPUs; gives a client of what Ray Serve runs there."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        ray_serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_two_replicas_share_a_library(ray_serve, client, tiny_pipe_folder, library, pipe_template):
    alone = Alone(fresh_copy(pipe_template, requires_safety_checker=False), library)
    expected = {name: pixels(alone(ask(f"sks mug <atoms:{name}>", 2, seed=5))) for name in ("ant", "bee")}
    options = {"library": library, "max_batch": 2, "min_replicas": 2, "max_replicas": 2}
    ray_serve.run(app({"pretrained_model_name_or_path": tiny_pipe_folder, **options}))

    def send(name, like):
        body = {"prompt": f"sks mug <atoms:{name}>", "steps": 2, "seed": 5, "guidance_scale": 3.0}
        answer = client.post(GENERATE, json=body)
        if like is None:
            return f"no concept '{name}'" in message_of(answer, 400)
        assert answer.status_code == 200, answer.text
        return abs(pixels_of(answer.json()["data"][0]["b64_json"]) - expected[like]).max() <= 1

    def send_many(name, like, count=8):
        with ThreadPoolExecutor(count) as pool:
            assert all(pool.map(send, [name] * count, [like] * count))

    send_many("ant", "ant", 9)
    finished = set()
    while len(finished) < 2:
        (line,) = [each for each in client.get("/metrics").text.splitlines() if 'end="finished"' in each]
        finished.add(float(line.split()[-1]))
    assert sum(finished) == 9 and min(finished) > 0

    for like in ("bee", "ant"):  # the second replaces the first
        file = {"file": ("dog", (library / f"{like}.atoms.safetensors").read_bytes())}
        assert client.post("/v1/concepts", files=file, data={"overwrite": "true"}).status_code == 201
        send_many("dog", like)
    assert client.delete("/v1/concepts/dog").status_code == 204
    send_many("dog", None)
    assert {client.get("/v1/concepts").json()["total"] for _ in range(6)} == {3}


def test_a_server_gets_full_batches_and_the_queue_calls_for_more(ray_serve, tiny_pipe_folder):
    config = ReplicasConfig(
        pretrained_model_name_or_path=str(tiny_pipe_folder), max_batch=4, max_queue=20, num_gpus=0.5
    )
    options = deployment_options(config)
    assert ray_serve.deployment(**options)(type("Replica", (), {})).max_ongoing_requests == 8
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 4}
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5} and options["max_queued_requests"] == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_batch": "many"}, "max_batch"),
        ({"replicas": 2}, "replicas"),
        ({"min_replicas": 9}, "max_replicas=4: expected at least min_replicas, 9"),
        ({"library": "no/folder"}, "library='no/folder': found nothing there"),
    ],
)
def test_wrong_options_are_told(ray_serve, tiny_pipe_folder, args, message):
    with pytest.raises(UserError, match=message):
        app({"pretrained_model_name_or_path": tiny_pipe_folder, **args})


def test_a_missing_ray_is_told(tiny_pipe_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "atomdiff\[serve-ray\]"'):
        app({"pretrained_model_name_or_path": tiny_pipe_folder})


def test_the_arguments_of_the_page_are_accepted(ray_serve, tiny_pipe_folder, library):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    words = shlex.split(re.search(r"^serve run (.*)$", page, re.MULTILINE)[1])
    (application,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["applications"]
    assert words[0] == application["import_path"] == f"{app.__module__}:{app.__name__}"
    there = {"pretrained_model_name_or_path": tiny_pipe_folder, "library": library}
    for args in (dict(word.split("=") for word in words[1:]), application["args"]):
        assert there.keys() < args.keys()
        app(args | there)
