"""The HTTP server: its answers, what it refuses, and what happens under load."""

import base64
import errno
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from atomdiff.cli.main import main
from atomdiff.concepts.concept_file import read_header
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.loaded_concepts import list_atoms
from atomdiff.serving.app import make_app
from atomdiff.serving.config import ServeConfig
from tests.serving.helpers import GENERATE, Alone, ask, message_of, pixels, pixels_of
from tests.tiny_models import fresh_copy

QUICK = {"steps": 2, "guidance_scale": 3.0}
REQUESTS = int(os.environ.get("ATOMDIFF_LOAD_TEST_REQUESTS", "30"))


@pytest.fixture
def alone(pipe_template, library):
    return Alone(fresh_copy(pipe_template, requires_safety_checker=False), library)


def test_images_in_the_shape_of_openai(serve, alone):
    client = serve()
    body = {"prompt": "a sks mug <atoms:ant:0.5>", "n": 2, "size": "40x32", "seed": 7, "quality": "hd", **QUICK}
    answer = client.post(GENERATE, json=body | {"negative_prompt": "a cat", "concepts": {"ant": 9}})
    assert answer.status_code == 200, answer.text
    images = answer.json()["data"]
    assert [image["seed"] for image in images] == [7, 8]
    for image in images:
        expected = alone(
            ask("a sks mug <atoms:ant:0.5>", 2, seed=image["seed"], negative_prompt="a cat", width=40, height=32)
        )
        assert abs(pixels_of(image["b64_json"]) - pixels(expected)).max() <= 1
    text = Image.open(io.BytesIO(base64.b64decode(images[0]["b64_json"]))).text
    assert text["prompt"] == body["prompt"] and text["seed"] == "7" and text["scheduler"] == ""
    (used,) = json.loads(text["concepts"])
    assert used["file"] == "ant.atoms.safetensors" and used["weight"] == 0.5
    file = client.post(GENERATE, json=body | {"n": 1, "negative_prompt": "a cat", "response_format": "png"})
    assert file.headers["Content-Type"] == "image/png"
    assert abs(np.asarray(Image.open(io.BytesIO(file.content))) - pixels_of(images[0]["b64_json"])).max() <= 1


def test_images_in_the_shape_of_the_webui(serve, alone):
    client = serve()
    body = {"prompt": "sks mug <lora:bee:1>", "steps": 2, "cfg_scale": 3.0, "seed": 5, "sampler_name": "Euler"}
    answer = client.post("/sdapi/v1/txt2img", json=body | {"width": 32, "height": 32, "n_iter": 2})
    assert answer.status_code == 200, answer.text
    text = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).text
    assert text["parameters"] == json.loads(answer.json()["info"])["infotexts"][0]
    expected = alone(ask("sks mug <atoms:bee>", 2, seed=5, scheduler="euler"))
    assert abs(pixels_of(answer.json()["images"][0]) - pixels(expected)).max() <= 1
    assert json.loads(answer.json()["info"])["all_seeds"] == [5, 6]
    assert {each["name"] for each in client.get("/sdapi/v1/loras").json()} == {"ant", "bee", "cat"}
    assert "Euler a" in {each["name"] for each in client.get("/sdapi/v1/samplers").json()}
    assert client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "tiny-sd"
    assert "enable_hr=True" in message_of(client.post("/sdapi/v1/txt2img", json={"enable_hr": True}), 400)
    assert message_of(client.post("/sdapi/v1/txt2img", json={"cfg_scale": -1}), 400).startswith("cfg_scale=-1")
    assert "sampler_name='LMS'" in message_of(client.post("/sdapi/v1/txt2img", json={"sampler_name": "LMS"}), 400)


def test_concepts_are_uploaded_listed_and_deleted(serve, library, tmp_path, tiny_pipe):
    client = serve()
    file = library / "ant.atoms.safetensors"
    metadata = read_header(file)[0] | {"modelspec.thumbnail": "data:image/png;base64,AAAA"}
    save_file(load_file(file), tmp_path / "x", metadata)
    data = (tmp_path / "x").read_bytes()
    answer = client.post("/v1/concepts", files={"file": ("new-1.atoms.safetensors", data)})
    assert answer.status_code == 201, answer.text
    listed = client.get("/v1/concepts", params={"search": "new"}).json()
    (concept,) = listed["data"]
    assert listed["total"] == 1 and concept["thumbnail"] == "data:image/png;base64,AAAA"
    assert (concept["trigger_phrase"], concept["trigger_words"]) == ("sks mug", ["sks"])
    assert client.get("/v1/concepts").json()["total"] == 4
    assert client.post(GENERATE, json={"prompt": "sks <atoms:new-1>", **QUICK}).status_code == 200
    again = client.post("/v1/concepts", files={"file": ("new-2.atoms.safetensors.atoms.safetensors", data)})
    assert again.status_code == 201 and client.delete(f"/v1/concepts/{again.json()['name']}").status_code == 204
    again = client.post("/v1/concepts", files={"file": ("new-1", data)})
    assert "'new-1' already" in message_of(again, 409)
    again = client.post("/v1/concepts", files={"file": ("x", data)}, data={"name": "new-1", "overwrite": "true"})
    assert again.status_code == 201
    assert client.delete("/v1/concepts/new-1").status_code == 204
    assert "no concept 'new-1'" in message_of(client.delete("/v1/concepts/new-1"), 404)
    assert "no concept 'new-1'" in message_of(client.post(GENERATE, json={"prompt": "<atoms:new-1>"}), 400)
    assert sorted(path.name for path in library.iterdir() if not path.name.startswith(".similar")) == [
        f"{name}.atoms.safetensors" for name in ("ant", "bee", "cat")
    ]


def test_uploads_need_no_hard_links(serve, library, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    client, file = serve(), (library / "ant.atoms.safetensors").read_bytes()
    assert client.post("/v1/concepts", files={"file": ("dog", file)}).status_code == 201
    assert "'dog' already" in message_of(client.post("/v1/concepts", files={"file": ("dog", b"")}), 409)
    assert (library / "dog.atoms.safetensors").read_bytes() == file
    (library / "eel.atoms.safetensors").write_bytes(file)  # by another server, in this moment
    monkeypatch.setattr(ConceptLibrary, "__contains__", lambda *_: False)
    assert "'eel' already" in message_of(client.post("/v1/concepts", files={"file": ("eel", file)}), 409)
    assert {path.name for path in library.iterdir()} == {
        f"{name}.atoms.safetensors" for name in ("ant", "bee", "cat", "dog", "eel")
    }


def test_a_library_that_fails_is_no_fault_of_the_request(serve, library, monkeypatch):
    client, file = serve(), (library / "ant.atoms.safetensors").read_bytes()

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(library))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", fail)
        patch.setattr(Path, "unlink", fail)
        for answer in (
            client.post("/v1/concepts", files={"file": ("dog", file)}),
            client.delete("/v1/concepts/ant"),
        ):
            assert "the library cannot be written to (Read-only file system)" in message_of(answer, 500)
    assert client.post(GENERATE, json={"prompt": "sks <atoms:ant>", **QUICK}).status_code == 200
    shutil.rmtree(library)
    for answer in (
        client.get("/v1/concepts"),
        client.get("/sdapi/v1/loras"),
        client.post("/v1/concepts", files={"file": ("dog", file)}),
        client.post(GENERATE, json={"prompt": "sks <atoms:ant>", **QUICK}),
    ):
        assert "the library" in message_of(answer, 500) and str(library) not in answer.text
    assert client.post(GENERATE, json={"prompt": "a cat", **QUICK}).status_code == 200


def test_a_concept_that_goes_while_the_library_is_listed_harms_no_other(serve, library, monkeypatch):
    client, refresh = serve(), ConceptLibrary.refresh

    def refresh_before_others_delete(self):
        refresh(self)
        (library / "ant.atoms.safetensors").unlink()

    monkeypatch.setattr(ConceptLibrary, "refresh", refresh_before_others_delete)
    listed = client.get("/v1/concepts").json()["data"]
    assert [(each["name"], each["thumbnail"]) for each in listed] == [(name, None) for name in ("ant", "bee", "cat")]


def test_uploads_never_hide_lora_files(serve, library):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, library / "style.safetensors")
    client, file = serve(), (library / "ant.atoms.safetensors").read_bytes()
    for overwrite in ("false", "true"):
        answer = client.post("/v1/concepts", files={"file": ("style", file)}, data={"overwrite": overwrite})
        assert "there is a LoRA file 'style' already" in message_of(answer, 409)
    assert [each["name"] for each in client.get("/v1/concepts", params={"search": "style"}).json()["data"]] == ["style"]


def test_uploads_that_are_no_concepts_are_refused(serve, library, tmp_path):
    client = serve(max_upload_mb=0.3)
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    good = before["ant.atoms.safetensors"]
    foreign = {
        key: tensor.repeat(2, 2)
        for key, tensor in load_file(library / "ant.atoms.safetensors").items()
        if not key.startswith("token")
    }
    save_file(foreign, tmp_path / "foreign", read_header(library / "ant.atoms.safetensors")[0])
    refused = [
        ("dog", b"\x80\x04cposix\nsystem\n"),
        ("dog", good[:-9]),
        ("dog", b""),
        ("dog", (tmp_path / "foreign").read_bytes()),
        ("../dog", good),
        ("/etc/dog", good),
        (".dog", good),
        ("a<b>", good),
        ("d" * 300, good),
        ("\u732b" * 100, good),  # 300 bytes
    ]
    for name, data in refused:
        answer = client.post("/v1/concepts", files={"file": ("ignored", data)}, data={"name": name})
        assert str(library) not in message_of(answer, 400)
    assert "bytes" in message_of(client.post("/v1/concepts", files={"file": ("dog", good * 50)}), 413)
    assert client.delete("/v1/concepts/../../etc/passwd").status_code in (404, 405)
    assert client.delete("/v1/concepts/%2Fetc%2Fpasswd").status_code == 404
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 3}, "prompt=3"),
        ({"n": 0}, "n=0"),
        ({"n": 11}, "n=11"),
        ({"size": "big"}, "expected WIDTHxHEIGHT"),
        ({"size": "32x33"}, "height=33"),
        ({"size": "4096x4096"}, "at most 1024"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**9}, "at most 500"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"response_format": "url"}, "expected b64_json"),
        ({"response_format": "png", "n": 2}, "n=2: expected 1 with"),
        ({"prompt": "a cat " * 2000}, "prompt: found 12000 characters; expected at most 10000"),
        ({"negative_prompt": "a cat " * 2000}, "negative_prompt: found 12000 characters"),
        ({"seed": 2**70}, "seed="),
        ({"scheduler": "lms"}, "expected one of ddim"),
        ({"concepts": {"dog": 1}}, "there is no concept 'dog'"),
        ({"concepts": {"bee": 1, "ant": {"weight": []}}}, "concepts: ant: found the adapter weight"),
        ({"prompt": "<atoms:ant:x>"}, "the tag '<atoms:ant:x>'"),
        (
            {"concepts": {f"c{number}": 1 for number in range(33)}},
            "found 33 concepts for one image; expected at most 32",
        ),
    ],
)
def test_bad_requests_say_what_to_change(served, fields, message):
    found = message_of(served.post(GENERATE, json={"prompt": "a cat", **QUICK, **fields}), 400)
    assert message in found and "num_inference_steps" not in found


@pytest.fixture
def served(serve):
    return serve()


def test_what_is_no_request_is_refused(served):
    bodies = {
        b"{": "found a body that is no JSON: Expecting property name enclosed in double quotes at character 1",
        b'{"prompt": "\xff"}': "the body cannot be read ('utf-8' codec can't decode byte 0xff in position 12: invalid",
        b"[" * 100_000: "the body cannot be read (maximum recursion depth exceeded",
        b"": "the body is missing",
        b"{}": "prompt is missing",
    }
    for body, message in bodies.items():
        answer = served.post(GENERATE, content=body, headers={"Content-Type": "application/json"})
        assert message_of(answer, 400).startswith(message)
    assert "file is missing" in message_of(served.post("/v1/concepts", data={"name": "x"}), 400)
    for header in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # the latter as curl's --data has it
        answer = served.post(GENERATE, content=b'{"prompt": "a cat"}', headers=header)
        assert "send the header 'Content-Type: application/json'" in message_of(answer, 400)
    assert "/docs" in message_of(served.get("/nothing"), 404)
    answer = served.get(GENERATE)
    assert message_of(answer, 405) and answer.headers["Allow"] == "POST"


def test_large_bodies_are_refused_also_where_their_size_is_not_told(served):
    head = b'--q\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    form = "multipart/form-data; boundary=q"
    for path, kind, most in ((GENERATE, "application/json", 1 << 20), ("/v1/concepts", form, 16_065_536)):
        chunks = (head if number == 0 else b"x" * 10**6 for number in range(30))
        answer = served.post(path, content=chunks, headers={"Content-Type": kind})
        assert f"found a body of more than {most} bytes" in message_of(answer, 413)
    answer = served.post(GENERATE, json={"prompt": "a" * (1 << 20)})
    assert "expected at most 1048576" in message_of(answer, 413)


def test_errors_are_short_whatever_they_quote(served):
    message = message_of(served.post(GENERATE, json={"prompt": "a", "size": "x" * 100_000}), 400)
    assert len(message) < 2100 and message.startswith("size='xxx") and message.endswith("such as 512x512, or auto")


def test_pages_of_other_sites_and_other_hosts_are_refused(served):
    assert message_of(served.get("/health", headers={"Origin": "http://evil.example"}), 403)
    assert message_of(served.get("/health", headers={"Host": "evil.example"}), 403)
    for name in ("Host", "Origin"):
        assert message_of(served.get("/health", headers={name: "http://["}), 403)
    origin = str(served.base_url).rstrip("/")
    assert served.get("/health", headers={"Origin": origin}).status_code == 200


def test_key(serve):
    client = serve(api_key="secret")
    assert "Authorization: Bearer KEY" in message_of(client.get("/v1/concepts"), 401)
    for wrong in ("Bearer secre", "Bearer", "Basic !!", "secret"):
        assert message_of(client.get("/v1/concepts", headers={"Authorization": wrong}), 401)
    assert client.get("/v1/concepts", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/sdapi/v1/loras", auth=("any", "secret")).status_code == 200
    assert client.get("/health").status_code == client.head("/health").status_code == 200
    described = client.get("/openapi.json").json()  # for its page to ask for the key
    assert described["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    assert described["paths"][GENERATE]["post"]["security"] == [{"HTTPBearer": []}]
    figures = client.get("/metrics", auth=("any", "secret")).text
    assert 'atomdiff_errors_total{status="401"} 5.0' in figures


def test_paths_that_need_no_key_are_known_below_a_prefix(make_engine, tiny_pipe_folder):
    config = ServeConfig(pretrained_model_name_or_path=str(tiny_pipe_folder), api_key="secret")
    with TestClient(make_app(make_engine(), config), "http://localhost", root_path="/images") as client:
        assert client.get("/images/health").status_code == client.get("/images/docs").status_code == 200
        assert message_of(client.get("/images/v1/concepts"), 401)
        assert message_of(client.get("/v1/concepts"), 401)


def test_documentation_needs_no_network(served):
    page = served.get("/docs").text
    assert "http://" not in page and "https://" not in page
    assert served.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    paths = served.get("/openapi.json").json()["paths"]
    assert {GENERATE, "/v1/concepts", "/sdapi/v1/txt2img", "/metrics"} <= paths.keys()


def test_a_full_queue_says_when_to_come_back(serve):
    client = serve(max_queue=1)
    body = {"prompt": "a cat", "steps": 400, "n": 9}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, GENERATE, json=body)
        wait_until(lambda: client.get("/health").json()["running"])
        answer = client.post(GENERATE, json=body)
        assert "9 images are running or waiting, of 9" in message_of(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        for job in list(client.engine._queue._jobs):
            job.future.cancel()
        assert first.result().status_code == 499


def test_requests_that_take_too_long_are_given_up(serve):
    client = serve(request_timeout=0.3)
    assert "not done in time" in message_of(client.post(GENERATE, json={"prompt": "a cat", "steps": 500}), 504)
    wait_until(lambda: client.engine.stats.timed_out == 1)
    wait_until(lambda: client.get("/health").json()["running"] == 0)


def test_clients_that_leave_withdraw_their_images(serve):
    client = serve()
    with pytest.raises(httpx.ReadTimeout):
        client.post(GENERATE, json={"prompt": "a cat", "steps": 500, "n": 4}, timeout=0.3)
    wait_until(lambda: client.engine.stats.cancelled == 4)
    assert client.post(GENERATE, json={"prompt": "a cat", **QUICK}).status_code == 200


def test_stopping_gives_up_what_takes_longer_than_it_may(serve):
    client = serve(shutdown_timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, GENERATE, json={"prompt": "a cat", "steps": 500, "n": 4})
        wait_until(lambda: client.engine.num_running)
        client.server.should_exit = True
        assert "stopped before the image was done" in message_of(running.result(), 503)


def test_metrics(served):
    served.post(GENERATE, json={"prompt": "a cat", **QUICK})
    served.post(GENERATE, json={"prompt": "a cat", "steps": 0})
    lines = dict(line.rsplit(" ", 1) for line in served.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines["atomdiff_images_total"] == lines['atomdiff_errors_total{status="400"}'] == "1.0"
    assert lines["atomdiff_denoising_steps_total"] == "2.0"
    assert lines['atomdiff_jobs_total{end="finished"}'] == lines["atomdiff_request_seconds_count"] == "1.0"


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_mixed_requests_with_bad_ones_among_them(serve, alone, library, tiny_pipe):
    """Every image is that of its own request, and nothing of them stays behind."""
    client = serve(max_queue=1000)
    random_ = random.Random(0)
    prompts = ["a red cat", "sks mug <atoms:ant>", "sks mug <atoms:bee:0.8>", "a sks mug <atoms:cat>"]
    kinds = [(prompt, steps, seed) for prompt in prompts for steps in (1, 3) for seed in (4,)]
    expected = {kind: pixels(alone(ask(kind[0], kind[1], seed=kind[2]))) for kind in kinds}
    extra = (library / "ant.atoms.safetensors").read_bytes()

    def send(number):
        kind = random_.choice(kinds)
        body = {"prompt": kind[0], "steps": kind[1], "seed": kind[2], "guidance_scale": 3.0}
        match number % 10:
            case 7:
                return message_of(client.post(GENERATE, json=body | {"steps": -1}), 400)
            case 8:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(GENERATE, json=body | {"steps": 300}, timeout=0.05)
                return None
            case 9:
                client.post("/v1/concepts", files={"file": ("extra", extra)}, data={"overwrite": "true"})
                answer = client.post(GENERATE, json=body | {"prompt": "sks <atoms:extra>"})
                client.delete("/v1/concepts/extra")
                return answer.status_code in (200, 400) or pytest.fail(answer.text)
        answer = client.post(GENERATE, json=body)
        assert answer.status_code == 200, answer.text
        return abs(pixels_of(answer.json()["data"][0]["b64_json"]) - expected[kind]).max() <= 1

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(send, range(REQUESTS)))
    assert all(result is None or result for result in results)
    wait_until(lambda: not client.engine._queue._jobs)
    assert threading.active_count() < 80
    assert len(list_atoms(tiny_pipe)) <= 65
    assert client.engine.is_running
    assert torch.isfinite(next(tiny_pipe.unet.parameters())).all()


def test_the_command_says_which_extra_is_missing(monkeypatch, capsys, tiny_pipe_folder):
    from atomdiff.serving import server

    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve", "--pretrained_model_name_or_path", str(tiny_pipe_folder)]) == 2
    assert 'uvicorn is missing; pip install "atomdiff[serve]"' in capsys.readouterr().err
