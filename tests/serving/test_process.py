"""`atomdiff serve` as a process: from its start to SIGTERM; and what it says where it cannot start."""

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from atomdiff.cli.main import main

ROOT = Path(__file__).parents[2]
SECONDS = 90  # for all of it, on a busy machine


def wait_until(condition, process):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_from_its_start_to_sigterm(tiny_pipe_folder, library, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--pretrained_model_name_or_path", tiny_pipe_folder, "--library", library, "--port", str(port)]
    log = tmp_path / "log"
    with (
        open(log, "w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "atomdiff", "serve", *options], stdout=file, stderr=file, cwd=ROOT
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        ends = threading.Timer(SECONDS, process.kill)
        ends.start()
        try:
            wait_until(lambda: answers(client), process)
            assert size_of(ask(client, "sks mug <atoms:ant:0.5>", 2)) == (32, 32)

            file = (library / "ant.atoms.safetensors").read_bytes()
            assert client.post("/v1/concepts", files={"file": ("dog.atoms.safetensors", file)}).status_code == 201
            assert ask(client, "sks mug <atoms:dog>", 2).status_code == 200
            assert client.delete("/v1/concepts/dog").status_code == 204
            assert ask(client, "sks mug <atoms:dog>", 2).status_code == 400

            running = pool.submit(ask, client, "sks mug <atoms:ant>", 150)
            wait_until(lambda: client.get("/health").json()["running"], process)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not answers(client), process)
            assert not running.done()
            assert size_of(running.result()) == (32, 32)
            assert process.wait(SECONDS) == 0
        finally:
            ends.cancel()
            process.kill()
    assert f"http://127.0.0.1:{port}" in log.read_text() and "Traceback" not in log.read_text()


def ask(client, prompt, steps):
    return client.post("/v1/images/generations", json={"prompt": prompt, "steps": steps})


def answers(client):
    try:
        return httpx.get(client.base_url.join("/health")).status_code == 200  # by a connection of its own
    except httpx.TransportError:
        return False


def size_of(answer):
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    image.load()
    return image.size


@pytest.fixture
def refusal(capsys):
    """Calls `atomdiff serve`; returns the line that says why it does not start."""

    def call(**options):
        assert main(["serve", *(f"--{name}={value}" for name, value in options.items())]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    return call


def test_a_port_that_is_taken_is_told_before_the_base_is_opened(refusal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(pretrained_model_name_or_path="/no/base", port=port)
    assert f"port={port}" in message and "Address already in use" in message and "another --port" in message


def test_a_host_that_is_not_of_this_machine_is_told(refusal):
    message = refusal(pretrained_model_name_or_path="/no/base", host="192.0.2.1", port=0)
    assert "host='192.0.2.1'" in message and "another --port or --host" in message


def test_a_missing_library_is_told(refusal, tiny_pipe_folder, tmp_path):
    message = refusal(pretrained_model_name_or_path=tiny_pipe_folder, library=tmp_path / "none")
    assert f"library='{tmp_path}/none': found nothing there; check the path" in message


def test_a_missing_base_is_told(refusal, tmp_path):
    message = refusal(pretrained_model_name_or_path=tmp_path / "none", port=0)
    assert f"{tmp_path}/none' is not a folder or file here" in message


def test_a_library_that_is_a_file_is_told(refusal, tiny_pipe_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    message = refusal(pretrained_model_name_or_path=tiny_pipe_folder, library=tmp_path / "file", port=0)
    assert f"{tmp_path}/file" in message
