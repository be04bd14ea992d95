"""Concepts on the Hub: the real client speaks to a stand-in on this machine, and nothing reaches the network."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import LoraConfig
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.push import write_repository
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.sampling.output_files import SampleFile, write_overview
from atomdiff.training import dreambooth
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file

WRITER, READER = {"authorization": "Bearer hf_writer"}, {"authorization": "Bearer hf_reader"}


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory, behind those endpoints of the Hub that the client asks."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.asked = []
        self.status = None

    def handle_error(self, request, client_address):
        """A client that hangs up is none of the tests' business."""

    def put(self, repo_id, files, **settings):
        repo = self.repositories.setdefault(repo_id, {"commits": [], "files": {}, "pulls": [], **settings})
        repo["files"] |= {name: Path(file).read_bytes() for name, file in files.items()}
        return self.commit(repo, "put")

    def commit(self, repo, summary):
        sha = hashlib.sha1(repr((summary, sorted(repo["files"].items()))).encode()).hexdigest()
        repo["commits"].append((sha, summary, dict(repo["files"])))
        return sha

    def files(self, repo_id):
        return self.repositories[repo_id]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def answer(self, verb):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        hub.asked.append(f"{verb} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunks()
        self.user = {"Bearer hf_writer": "write", "Bearer hf_reader": "read"}.get(self.headers.get("authorization"))
        if hub.status:
            return self.refuse(hub.status, "Out of order")
        if path == "/api/whoami-v2":
            role = {"auth": {"accessToken": {"role": self.user}}}
            return self.json({"name": "ada", **role}) if self.user else self.refuse(401)
        if path == "/api/validate-yaml":
            header = json.loads(self.body)["content"].split("---")[1]
            wrong = yaml.safe_load(header).get("license") == "nonsense"
            return self.json(
                {"errors": [{"message": "no such license"}]} if wrong else {"errors": []}, 400 * wrong or 200
            )
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        found = re.fullmatch(r"/(api/models/)?([\w.-]+/[\w.-]+)(?:/(\w+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        repo = hub.repositories.get(found[2])
        if repo is None or (repo.get("private") and not self.user):
            return self.refuse(404 if self.user else 401, code="RepoNotFound")
        self.repository(repo, *found.groups(), parse_qs(url.query))

    def repository(self, repo, api, repo_id, what, revision, name, query):
        if what in ("preupload", "commit") and self.user != "write":
            return self.refuse(403, "no write access")
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in self.posted()["files"]
            ]
            return self.json({"files": files})
        if what == "commit":
            return self.take(repo, repo_id, "create_pr" in query)
        commits = [commit for commit in repo["commits"] if revision in (None, "main", commit[0])]
        if not commits:
            return self.refuse(404, code="RevisionNotFound")
        sha, _, files = commits[-1]
        if what == "tree":
            rows = [{"type": "file", "path": n, "size": len(b), "oid": self.oid(b)} for n, b in files.items()]
            return self.json(rows)
        if api:
            return self.json({"id": repo_id, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        if repo.get("gated") and not self.user:
            return self.refuse(403, code="GatedRepo")
        if name not in files:
            return self.refuse(404, code="EntryNotFound", sha=sha)
        self.send(200, files[name], {"ETag": f'"{self.oid(files[name])}"', "X-Repo-Commit": sha})

    def create(self, asked):
        owner = asked["organization"] or "ada"
        repo_id = f"{owner}/{asked['name']}"
        if self.user != "write" or owner != "ada":
            return self.refuse(403 if self.user else 401, "no write access to this namespace")
        if repo_id in self.server.repositories:
            return self.json({"url": f"{self.server.url}/{repo_id}"}, 409)
        repo = {"commits": [], "files": {}, "pulls": [], "private": asked.get("visibility") == "private"}
        self.server.repositories[repo_id] = repo
        self.server.commit(repo, "initial commit")
        self.json({"url": f"{self.server.url}/{repo_id}"})

    def take(self, repo, repo_id, pull):
        lines = [json.loads(line) for line in self.body.splitlines()]
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        at = f"{self.server.url}/{repo_id}"
        if pull:
            repo["pulls"].append(files)
            return self.json({"commitUrl": f"{at}/commit/0", "commitOid": "0", "pullRequestUrl": f"{at}/discussions/1"})
        repo["files"] |= files
        sha = self.server.commit(repo, summary)
        self.json({"commitUrl": f"{at}/commit/{sha}", "commitOid": sha})

    def posted(self):
        return json.loads(self.body)

    def chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @staticmethod
    def oid(content):
        return hashlib.sha1(content).hexdigest()

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message="", code="", sha=""):
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": sha}
        self.send(status, b"{}", {key: value for key, value in headers.items() if value})

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The stand-in, with the client pointed at it, logged out and unable to look up any other host."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    point_client_at(monkeypatch, server.url)
    for name, value in {"HF_HUB_CACHE": "cache", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "tokens"}.items():
        monkeypatch.setattr(constants, name, str(tmp_path / "hf" / value))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    look_up = socket.getaddrinfo

    def only_here(host, *rest, **more):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"asked for {host}"
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    yield server
    server.shutdown()
    server.server_close()


def point_client_at(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def train(pipe, config, word="sks"):
    """Leave random numbers in an adapter of the UNet and in a word."""
    generator = torch.Generator().manual_seed(0)
    pipe.unet.add_adapter(config, "default")
    with torch.no_grad():
        for key, parameter in pipe.unet.named_parameters():
            if ".default" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 20)
    add_placeholder_token(pipe, word)
    set_token_embedding(pipe, word, {"text_encoder": torch.randn(32, generator=generator)})


@pytest.fixture
def concept(tiny_pipe, tmp_path):
    """A concept file beside nothing else, and the image that it makes."""
    train(tiny_pipe, AtomConfig(channel_block=4, target_modules=["conv_in", "to_q"]))
    facts = {"steps": 40, "seed": 0, "final_loss": 0.123456, "config": {"learning_rate": 0.005, "seed": 0}}
    file = tmp_path / "run" / "my mug.v2.atoms.safetensors"
    options = {"trigger_phrase": "sks mug", "training": facts, "base_model": "someone/stable-diffusion"}
    atomdiff.save_atoms(tiny_pipe, file, dtype=torch.float32, **options)
    made = picture(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    return file, made


@pytest.fixture
def lora(tiny_pipe, tmp_path):
    train(tiny_pipe, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    tiny_pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "default")
    folder = atomdiff.save_atoms(tiny_pipe, tmp_path / "lora")
    made = picture(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    return folder, made


def picture(pipe, prompt="a photo of sks mug"):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, 5, pipe.encode_prompt(prompt, "cpu", 1, False)[0]).sample


def draw(folder, concept, prompts, name="grid"):
    """Leave what `atomdiff sample` leaves."""
    folder.mkdir(exist_ok=True)
    concepts = json.dumps([{"file": concept.name, "sha256": hash_file(concept), "weight": 1.0}])
    files = [SampleFile(folder, prompt, 0, {"concepts": concepts}) for prompt in prompts]
    for file in files:
        file.save(Image.new("RGB", (8, 8), "red"))
    write_overview(folder, files)
    return [file.path for file in files]


def card_of(readme):
    """The card's metadata and its text."""
    _, header, text = str(readme).split("---\n", 2)
    return yaml.safe_load(header), text


def test_what_is_pushed_is_loaded(server, logged_in, concept, tiny_pipe, tmp_path):
    file, made = concept
    base = picture(tiny_pipe)
    assert atomdiff.push_to_hub(file, "ada/mug") == f"{server.url}/ada/mug"
    assert server.files("ada/mug").keys() == {"README.md", "my mug.v2.atoms.safetensors"}
    assert [summary for _, summary, _ in server.repositories["ada/mug"]["commits"]][1:] == [
        "Upload a concept of atomdiff"
    ]
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug") == "my_mug"
    assert torch.equal(picture(tiny_pipe), made) and not torch.equal(made, base)
    atomdiff.unload_atoms(tiny_pipe)
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name=file.name) == "again"
    assert torch.equal(picture(tiny_pipe), made)


def test_a_peft_adapter_is_pushed_and_loaded_with_its_word_and_all_components(server, logged_in, lora, tiny_pipe):
    folder, made = lora
    (folder / "optimizer.bin").write_bytes(b"not for others")
    atomdiff.push_to_hub(folder, "ada/mug.lora", base_model="someone/stable-diffusion", trigger_phrase="sks cup")
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    words = {"README.md", "learned_embeds.safetensors"}
    assert server.files("ada/mug.lora").keys() == adapter | words | {f"text_encoder/{name}" for name in adapter}
    data, text = card_of(server.files("ada/mug.lora")["README.md"].decode())
    assert data["base_model"] == "someone/stable-diffusion" and data["instance_prompt"] == "sks cup"
    assert 'load_atoms(pipe, "ada/mug.lora")' in text and "LORA" in text
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug.lora") == "mug"
    torch.testing.assert_close(picture(tiny_pipe), made, atol=1e-6, rtol=0)
    assert set(atomdiff.list_atoms(tiny_pipe)[0].layers) == {"unet", "text_encoder"}


def test_a_word_alone_is_a_concept(server, logged_in, lora, tiny_pipe):
    server.put("ada/word", {"learned_embeds.safetensors": lora[0] / "learned_embeds.safetensors"})
    assert atomdiff.load_atoms(tiny_pipe, "ada/word") == "word"
    assert atomdiff.list_atoms(tiny_pipe)[0].trigger_words == ("sks",)


def test_one_of_several_is_chosen_by_name_folder_and_revision(server, concept, lora, tiny_pipe):
    file, _ = concept
    weights = lora[0] / "adapter_model.safetensors"
    first = server.put("ada/many", {"a.atoms.safetensors": file})
    second = {"b.atoms.safetensors": file, "old/c.atoms.safetensors": file, "other.safetensors": file}
    server.put("ada/many", {**second, "adapter_config.json": lora[0] / "adapter_config.json"})
    server.put("ada/many", {"adapter_model.safetensors": weights})
    several = "3 concepts: .*a.atoms.safetensors, b.atoms.safetensors, adapter_model.safetensors$"
    with pytest.raises(UserError, match=several):
        atomdiff.load_atoms(tiny_pipe, "ada/many")
    choices = {
        "a": {"revision": first},
        "b": {"weight_name": "b.atoms.safetensors"},
        "c": {"subfolder": "old"},
        "other": {"weight_name": "other.safetensors"},
        "many": {"weight_name": "adapter_model.safetensors"},
    }
    for name, choice in choices.items():
        assert atomdiff.load_atoms(tiny_pipe, "ada/many", **choice) == name
        atomdiff.unload_atoms(tiny_pipe)
    assert len(list(Path(constants.HF_HUB_CACHE).rglob("*.atoms.safetensors"))) == 3


def test_a_folder_on_this_disk_is_chosen_from_in_the_same_way_and_goes_first(server, concept, tiny_pipe, monkeypatch):
    file, made = concept
    monkeypatch.chdir(file.parent.parent)
    assert atomdiff.load_atoms(tiny_pipe, "run") == "my_mug"
    assert torch.equal(picture(tiny_pipe), made)
    atomdiff.unload_atoms(tiny_pipe)
    Path("ada/mug").mkdir(parents=True)
    (Path("ada/mug") / "one.atoms.safetensors").write_bytes(file.read_bytes())
    server.put("ada/mug", {"of_the_hub.atoms.safetensors": file})
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug") == "one"
    atomdiff.unload_atoms(tiny_pipe)
    (Path("ada/mug") / "two.atoms.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="2 concepts: .*one.atoms.safetensors, two.atoms.safetensors"):
        atomdiff.load_atoms(tiny_pipe, "ada/mug")
    assert atomdiff.load_atoms(tiny_pipe, "ada", subfolder="mug", weight_name="two.atoms.safetensors") == "two"
    assert not server.asked


def test_an_adapter_in_the_current_folder_has_its_name(lora, tiny_pipe, monkeypatch):
    monkeypatch.chdir(lora[0])
    assert atomdiff.load_atoms(tiny_pipe, ".") == "lora"


def test_only_safetensors_and_json_are_downloaded(server, concept, lora, tiny_pipe, tmp_path):
    evil = tmp_path / "evil.bin"
    evil.write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    code = tmp_path / "code.py"
    code.write_text("raise SystemExit")
    others = {"adapter_model.bin": evil, "pytorch_model.bin": evil, "modeling.py": code, "text_encoder/x.bin": evil}
    peft = {file.name: file for file in lora[0].glob("adapter_*")}
    server.put("ada/lora", {**others, **peft})
    server.put("ada/mug", {**others, "mug.atoms.safetensors": concept[0], "[a]*.atoms": evil})
    atomdiff.load_atoms(tiny_pipe, "ada/lora")
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, "ada/mug")
    got = {path.rpartition("/")[2] for path in server.asked if path.startswith("GET") and "/resolve/" in path}
    assert got == {"adapter_config.json", "adapter_model.safetensors", "mug.atoms.safetensors"}
    for name in ("adapter_model.bin", "../evil.bin", "modeling.py"):
        with pytest.raises(UserError, match="only safetensors files are loaded"):
            atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name=name)
    with pytest.raises(UserError, match="has no '../x.safetensors'"):
        atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name="../x.safetensors")


def test_names_of_files_are_not_patterns(server, concept, tiny_pipe):
    server.put("ada/odd", {"[ab]*.atoms.safetensors": concept[0], "a.atoms.safetensors": concept[0]})
    atomdiff.load_atoms(tiny_pipe, "ada/odd", "odd", weight_name="[ab]*.atoms.safetensors")
    assert "GET /ada/odd/resolve/" not in " ".join(
        path for path in server.asked if path.endswith("/a.atoms.safetensors")
    )


def test_a_download_serves_when_the_hub_does_not(server, concept, tiny_pipe, monkeypatch, tmp_path):
    file, made = concept
    server.put("ada/mug", {"mug.atoms.safetensors": file, "README.md": file})
    with pytest.raises(UserError, match="'ada/mug', and .*: the Hub was not asked .* not in the cache; go online once"):
        atomdiff.load_atoms(tiny_pipe, "ada/mug", local_files_only=True)
    assert not server.asked
    atomdiff.load_atoms(tiny_pipe, "ada/mug", cache_dir=tmp_path / "kept")
    asked = len(server.asked)
    ways = {
        "not asked": lambda patch: None,
        "offline": lambda patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        "out of order": lambda patch: patch.setattr(server, "status", 503),
        "not reached": lambda patch: point_client_at(patch, "http://127.0.0.1:1"),
    }
    for way, break_down in ways.items():
        with monkeypatch.context() as patch:
            break_down(patch)
            for choice in ({}, {"weight_name": "mug.atoms.safetensors"}):
                atomdiff.unload_atoms(tiny_pipe)
                local = {"local_files_only": way == "not asked", "cache_dir": tmp_path / "kept"}
                assert atomdiff.load_atoms(tiny_pipe, "ada/mug", **local, **choice) == "mug"
                assert torch.equal(picture(tiny_pipe), made)
            with pytest.raises(UserError, match="does not answer"):
                atomdiff.load_atoms(tiny_pipe, "ada/other", local_files_only=way == "not asked")
    assert not any(path.startswith("GET /ada") for path in server.asked[asked:])
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, "ada/mug", cache_dir=tmp_path / "kept", force_download=True)
    assert any(path.startswith("GET /ada") for path in server.asked[asked:])


def test_a_download_from_folders_within_folders_serves_as_well(server, concept, lora, tiny_pipe):
    files = {file.relative_to(lora[0]).as_posix(): file for file in lora[0].rglob("*.*")}
    server.put("ada/many", {f"pets/cat/{name}": file for name, file in files.items()})
    server.put("ada/many", {"pets/dog/dog.atoms.safetensors": concept[0], "other.atoms.safetensors": concept[0]})
    for subfolder, name in {"pets/cat": "cat", "pets/dog": "dog"}.items():
        for local in (False, True):
            options = {"subfolder": subfolder, "local_files_only": local}
            assert atomdiff.load_atoms(tiny_pipe, "ada/many", **options) == name
            atomdiff.unload_atoms(tiny_pipe)
    with pytest.raises(UserError, match="what was downloaded of ada/many has no 'other.atoms.safetensors'"):
        options = {"weight_name": "other.atoms.safetensors", "local_files_only": True}
        atomdiff.load_atoms(tiny_pipe, "ada/many", **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ada/nothing", {}, "no file or directory 'ada/nothing', and .* no repository ada/nothing, or a private one"),
        ("ada/secret", {}, "no repository ada/secret, or a private one; check the name, or log in"),
        ("ada/gated", {}, "ada/gated is gated; ask for access at http.*/ada/gated, then log in with `hf auth login`"),
        ("ada/mug", {"revision": "v9"}, "ada/mug has no such revision; expected a branch, tag or commit"),
        ("ada/mug", {"weight_name": "cup.safetensors"}, "has no 'cup.safetensors'; the concepts there: mug.atoms.safe"),
        ("ada/mug", {"subfolder": "old"}, "ada/mug, folder old, holds no concept: found nothing; expected"),
        ("ada/empty", {}, "the repository ada/empty holds no concept: found README.md; expected .*atoms.safetensors"),
        ("./ada/mug", {}, "there is no file or directory './ada/mug': check the path"),
        ("/ada/mug", {}, "there is no file or directory '/ada/mug': check the path"),
        ("ada/mug.safetensors", {}, "there is no file or directory 'ada/mug.safetensors': check the path"),
        ("mug", {}, "there is no file or directory 'mug': check the path"),
        ("a/b/c", {}, "there is no file or directory 'a/b/c': check the path"),
        (Path("ada/mug"), {}, "there is no file or directory 'ada/mug': check the path"),
    ],
)
def test_what_cannot_be_fetched_is_said(server, concept, tiny_pipe, tmp_path, source, options, message):
    readme = tmp_path / "README.md"
    readme.write_text("empty")
    for name, settings in {"mug": {}, "secret": {"private": True}, "gated": {"gated": True}}.items():
        server.put(f"ada/{name}", {"mug.atoms.safetensors": concept[0]}, **settings)
    server.put("ada/empty", {"README.md": readme})
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, source, **options)
    assert not atomdiff.list_atoms(tiny_pipe)
    if "check the path" in message:
        assert not server.asked
    if source in ("ada/secret", "ada/gated"):
        assert atomdiff.load_atoms(tiny_pipe, source, token="hf_reader") == "mug"


def test_a_file_and_the_name_of_another_do_not_go_together(concept, tiny_pipe):
    with pytest.raises(UserError, match="weight_name='other.safetensors' names one in a folder"):
        atomdiff.load_atoms(tiny_pipe, concept[0], weight_name="other.safetensors")
    assert atomdiff.load_atoms(tiny_pipe, concept[0], weight_name=concept[0].name) == "my_mug"


def test_the_card_says_what_it_is_and_how_to_load_it(concept, tmp_path):
    file, _ = concept
    folder = write_repository(tmp_path / "repo", file, "ada/mug", license="cc-by-4.0", tags=["mug"])
    assert sorted(item.name for item in folder.iterdir()) == ["README.md", file.name]
    assert (folder / file.name).read_bytes() == file.read_bytes()
    data, text = card_of((folder / "README.md").read_text())
    assert data == {
        "base_model": "someone/stable-diffusion",
        "base_model_relation": "adapter",
        "instance_prompt": "sks mug",
        "library_name": "atomdiff",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "atomdiff", "stable-diffusion", "mug"],
    }
    numbers = sum(
        t.numel() for kinds in read_concept_file(file).layers.values() for k, t in kinds.items() if "delta" in k
    )
    assert f"| trainable parameters | {numbers + 32:,}, of which 32 in token embeddings |" in text
    assert f"| bytes | {file.stat().st_size:,} |" in text
    assert "| training | final loss 0.1235, seed 0, steps 40, learning rate 0.005 |" in text
    assert "Write `sks mug` in a prompt" in text and "<Gallery />" not in text and "{" not in text


def test_the_code_of_the_card_runs(server, logged_in, concept, tiny_pipe, monkeypatch):
    file, made = concept
    atomdiff.push_to_hub(file, "ada/mug")
    code = re.search("```python\n(.*?)```", server.files("ada/mug")["README.md"].decode(), re.DOTALL)[1]
    called = []

    class Pipe:
        components = tiny_pipe.components

        def __getattr__(self, name):
            return getattr(tiny_pipe, name)

        def __call__(self, prompt):
            called.append((prompt, picture(tiny_pipe, prompt)))
            return type("Output", (), {"images": ["image"]})

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda name: called.append(name) or tiny_pipe)
    monkeypatch.setattr(type(tiny_pipe), "__call__", lambda self, prompt: Pipe()(prompt))
    exec(code, {})
    assert called[0] == "someone/stable-diffusion" and called[1][0] == "a photo of sks mug"
    assert torch.equal(called[1][1], made)


def test_names_and_prompts_of_any_script_are_code_in_the_card(concept, tmp_path):
    file = concept[0].rename(concept[0].with_name("tasse \N{HOT BEVERAGE}\N{TEACUP WITHOUT HANDLE}.atoms.safetensors"))
    write_repository(tmp_path / "repo", file, "ada/mug", trigger_phrase='sks "\N{TEACUP WITHOUT HANDLE}"')
    _, text = card_of((tmp_path / "repo" / "README.md").read_text("utf-8"))
    called = re.search(r"load_atoms\(pipe, (.*)\)", text)[1]
    assert eval(f"dict(repo={called})") == {"repo": "ada/mug", "weight_name": file.name}
    assert eval(re.search(r"= pipe\((.*)\)\.images", text)[1]) == 'a photo of sks "\N{TEACUP WITHOUT HANDLE}"'


def test_a_base_of_this_disk_is_no_base_of_the_hub(concept, tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("samples/toybox-sd").mkdir(parents=True)
    for number, base in enumerate(["samples/toybox-sd", "/home/ada/secret/toybox-sd", "a/b/toybox-sd"]):
        write_repository(f"repo{number}", concept[0], "ada/mug", base_model=base)
        data, text = card_of(Path(f"repo{number}/README.md").read_text())
        assert "base_model" not in data and "base_model_relation" not in data
        assert "for `toybox-sd`" in text and '"path/to/toybox-sd"' in text and "secret" not in text


def test_images_generated_with_the_concept_are_found_beside_it_and_others_are_not(concept, tmp_path):
    file, _ = concept
    other = tmp_path / "other.atoms.safetensors"
    other.write_bytes(b"other")
    draw(file.parent, file, ["sks mug | on the beach", "sks mug in space"])
    draw(file.parent.parent / "elsewhere", other, ["a cat"])[0].rename(file.parent / "cat.png")
    Image.new("RGB", (8, 8)).save(file.parent / "before_after.png")
    Image.new("RGB", (8, 8)).save(file.parent / "photo.png")
    (file.parent / "broken.png").write_bytes(b"\x89PNG")
    long = PngImagePlugin.PngInfo()
    long.add_text("workflow", "x" * 2_000_000, zip=True)  # more than Pillow unpacks
    Image.new("RGB", (8, 8)).save(file.parent / "long.png", pnginfo=long)
    Image.new("RGB", (8, 8)).save(file.parent / "contact_sheet.png")
    folder = write_repository(tmp_path / "repo", file, "ada/mug")
    data, text = card_of((folder / "README.md").read_text())
    assert {item["text"] for item in data["widget"]} == {"sks mug | on the beach", "sks mug in space"}
    images = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").iterdir())
    assert [item["output"]["url"] for item in data["widget"]] == images[:2]
    assert [re.sub(r"images/\d+-", "", name) for name in images[2:]] == ["grid.png", "contact-sheet.png"]
    assert "<Gallery />" in text and all(f"]({name})" in text for name in images[2:])
    assert f'pipe("{data["widget"][0]["text"]}")' in text
    (file.parent / "manifest.json").write_text("{}")
    again = write_repository(tmp_path / "again", file, "ada/mug")
    assert not [path for path in (again / "images").iterdir() if "grid" in path.name]


def test_images_can_be_named_with_and_without_prompts_and_lose_their_metadata(concept, tmp_path):
    file, _ = concept
    drawn = draw(tmp_path / "drawn", file, ["sks mug"])[0]
    photo = tmp_path / "my photo.jpg"
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "where I live", 6
    Image.new("RGB", (8, 4)).save(photo, exif=exif)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", '{"a workflow": "secret"}')
    workflow = tmp_path / "workflow.png"
    Image.new("RGBA", (8, 4)).save(workflow, pnginfo=text)
    folder = write_repository(tmp_path / "repo", file, "ada/mug", images=[drawn, photo, str(workflow)])
    data, _ = card_of((folder / "README.md").read_text())
    assert [item["text"] for item in data["widget"]] == ["sks mug"]
    stored = sorted((folder / "images").iterdir())
    assert [path.name for path in stored][1:] == ["01-my-photo.png", "02-workflow.png"]
    sizes = []
    for path in stored:
        with Image.open(path) as image:
            assert not image.info and not image.getexif()
            sizes.append(image.size)
    assert sizes == [(8, 8), (4, 8), (8, 4)]
    named = write_repository(tmp_path / "named", file, "ada/mug", images={photo: "sks mug, again"})
    data, _ = card_of((named / "README.md").read_text())
    assert data["widget"] == [{"text": "sks mug, again", "output": {"url": "images/00-my-photo.png"}}]
    write_repository(tmp_path / "searched", file, "ada/mug", images=[tmp_path / "drawn"])
    assert len(list((tmp_path / "searched" / "images").iterdir())) == 2  # the picture and grid.png
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    for bad in (broken, tmp_path / "nothing.png"):
        with pytest.raises(UserError, match=f"cannot read the image {re.escape(str(bad))}"):
            write_repository(tmp_path / "bad", file, "ada/mug", images=[drawn, bad])
    assert not (tmp_path / "bad").exists()


def test_figures_come_from_the_report_about_this_file_or_are_given(concept, tmp_path):
    file, _ = concept
    report = {"file_bytes": file.stat().st_size, "train_seconds": 86.04, "similarity": {"base": 0.139, "concept": 0.68}}
    (file.parent / "report.json").write_text(json.dumps({**report, "drift": 0.1, "versions": {"torch": "2"}}))
    write_repository(tmp_path / "repo", file, "ada/mug")
    _, text = card_of((tmp_path / "repo" / "README.md").read_text())
    assert "| train seconds | 86.04 |\n| similarity, base | 0.139 |\n| similarity, concept | 0.68 |" in text
    assert "| drift | 0.1 |" in text and "torch" not in text and "file bytes" not in text
    for number, of_another in enumerate(({"file_bytes": 1}, {"file_sha256": "0" * 64})):
        (file.parent / "report.json").write_text(json.dumps({**report, **of_another}))
        write_repository(tmp_path / f"stale{number}", file, "ada/mug")
        assert "similarity" not in (tmp_path / f"stale{number}" / "README.md").read_text()
    write_repository(tmp_path / "given", file, "ada/mug", metrics={"a | b": {"DINO": 0.5}})
    assert r"| a \| b, DINO | 0.5 |" in (tmp_path / "given" / "README.md").read_text()


def test_a_folder_with_other_things_in_it_is_not_written_to(concept, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="full is not empty: name an empty or a new folder"):
        write_repository(tmp_path / "full", concept[0], "ada/mug")


def test_a_run_is_pushed_by_its_folder_and_a_wrong_path_asks_nobody(server, logged_in, concept, tmp_path):
    assert atomdiff.push_to_hub(concept[0].parent, "mug", private=True) == f"{server.url}/ada/mug"
    assert server.repositories["ada/mug"]["private"] and concept[0].name in server.files("ada/mug")
    asked = len(server.asked)
    for path, message in {"ada/mug": "no file or directory 'ada/mug': check", tmp_path: "holds no concept"}.items():
        with pytest.raises(UserError, match=message):
            atomdiff.push_to_hub(path, "ada/mug")
    assert len(server.asked) == asked


def test_pushing_again_updates_or_opens_a_pull_request_and_can_leave_the_card(server, logged_in, concept):
    atomdiff.push_to_hub(concept[0], "ada/mug")
    server.files("ada/mug")["README.md"] = b"by hand"
    other = concept[0].with_name("other.atoms.safetensors")
    other.write_bytes(concept[0].read_bytes())
    atomdiff.push_to_hub(other, "ada/mug", model_card=False, commit_message="another")
    assert server.files("ada/mug")["README.md"] == b"by hand" and other.name in server.files("ada/mug")
    assert [summary for _, summary, _ in server.repositories["ada/mug"]["commits"]][-1] == "another"
    url = atomdiff.push_to_hub(other, "ada/mug", create_pr=True)
    assert url.endswith("/ada/mug/discussions/1")
    assert server.repositories["ada/mug"]["pulls"][0].keys() == {"README.md", other.name}
    assert server.files("ada/mug")["README.md"] == b"by hand"


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        (
            "ada/mug",
            {},
            "cannot push to ada/mug: nobody is logged in; log in with `hf auth login`, set HF_TOKEN or pass",
        ),
        ("mug", {}, "cannot push to mug: nobody is logged in"),
        ("ada/mug", {"token": False}, "nobody is logged in"),
        ("ada/mug", {"token": "hf_wrong"}, "cannot push to ada/mug: the Hub does not accept the token"),
        ("mug", {"token": "hf_wrong"}, "cannot push to mug: the Hub does not accept the token"),
        ("mug", {"token": "hf_reader"}, "cannot push to mug: the token may only read; make one that may write"),
        (
            "ada/mug",
            {"token": "hf_reader"},
            r"the token may not do that \(no write access.*\); expected one that may write",
        ),
        ("bob/mug", {"token": "hf_writer"}, "cannot push to bob/mug: the token may not do that"),
        ("ada/a/b", {"token": "hf_writer"}, "cannot push to ada/a/b: Repo id must be in the form"),
        ("ada/mug", {"token": "hf_writer", "license": "nonsense"}, "Invalid metadata in README.md. - no such license"),
    ],
)
def test_what_cannot_be_pushed_is_said(server, concept, repo_id, options, message):
    with pytest.raises(UserError, match=message):
        atomdiff.push_to_hub(concept[0], repo_id, **options)


def test_a_hub_that_is_not_there_is_said(server, logged_in, concept, monkeypatch):
    with monkeypatch.context() as patch:
        point_client_at(patch, "http://127.0.0.1:1")
        with pytest.raises(UserError, match="http://127.0.0.1:1 cannot be reached .*; check the connection"):
            atomdiff.push_to_hub(concept[0], "ada/mug")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids access to the Hub; unset it"):
            atomdiff.push_to_hub(concept[0], "ada/mug")


@pytest.fixture
def run_config(train_config):
    prompts = ("a {trigger_word} {class_name}", "{trigger_word} in the city")
    return train_config(max_train_steps=2, validation_steps=1, validation_prompts=prompts, push_to_hub=True)


def test_a_run_pushes_its_concept_with_the_last_validation_images(server, run_config, tiny_pipe, capsys):
    config = dataclasses.replace(run_config, hub_token="hf_writer", hub_private_repo=True, report_to="tensorboard")
    written = dreambooth.train(config)
    assert f"pushed to {server.url}/ada/teapot" in capsys.readouterr().out
    assert server.repositories["ada/teapot"]["private"]
    data, _ = card_of(server.files("ada/teapot")["README.md"].decode())
    assert [item["text"] for item in data["widget"]] == ["a sks teapot", "sks in the city"]
    assert all("step-000002" in item["output"]["url"] for item in data["widget"])
    assert data["instance_prompt"] == "sks teapot" and "base_model" not in data
    assert server.files("ada/teapot")[written.name] == written.read_bytes()
    assert atomdiff.load_atoms(tiny_pipe, "ada/teapot", token="hf_writer") == "teapot"
    everything = [file.read_bytes() for file in Path(config.output_dir).rglob("*") if file.is_file()]
    assert not any(b"hf_writer" in content for content in [*everything, repr(config).encode()])


def test_every_concept_of_a_list_has_a_repository_of_its_own(server, run_config, tmp_path):
    (tmp_path / "teapot").rename(tmp_path / "mug")
    shutil.copytree(tmp_path / "mug", tmp_path / "rex")
    subjects = [
        {"instance_data_dir": str(tmp_path / name), "class_name": kind, "trigger_word": word}
        for name, kind, word in (("mug", "mug", "sks"), ("rex", "robot", "zwx"))
    ]
    (tmp_path / "shelf.yaml").write_text(json.dumps(subjects))
    fields = {"instance_data_dir": None, "concepts_list": str(tmp_path / "shelf.yaml"), "hub_model_id": "ada/shelf"}
    config = dataclasses.replace(run_config, hub_token="hf_writer", max_train_steps=1, validation_steps=0, **fields)
    for run in config.runs():
        dreambooth.train(run)
    assert server.repositories.keys() == {"ada/shelf-mug", "ada/shelf-rex"}
    for name, phrase in (("mug", "sks mug"), ("rex", "zwx robot")):
        files = server.files(f"ada/shelf-{name}")
        assert f"{name}.atoms.safetensors" in files
        assert card_of(files["README.md"].decode())[0]["instance_prompt"] == phrase


def test_a_folders_dots_stay_in_the_name_of_its_repository(server, run_config, tmp_path):
    (tmp_path / "teapot").rename(tmp_path / "mug.v1")
    changes = {"instance_data_dir": str(tmp_path / "mug.v1"), "max_train_steps": 1, "validation_steps": 0}
    dreambooth.train(dataclasses.replace(run_config, hub_token="hf_writer", **changes))
    assert server.repositories.keys() == {"ada/mug.v1"}


def test_a_run_that_cannot_push_does_not_start(server, run_config, tmp_path):
    with pytest.raises(UserError, match="cannot push to teapot: nobody is logged in"):
        dreambooth.train(run_config)
    with pytest.raises(UserError, match="cannot push to ada/x: the token may only read"):
        dreambooth.train(dataclasses.replace(run_config, hub_model_id="ada/x", hub_token="hf_reader"))
    with pytest.raises(UserError, match="push_to_hub=True: a fully tuned pipeline is pushed by hand"):
        dreambooth.train(dataclasses.replace(run_config, adapter="full", hub_token="hf_writer"))
    assert not list(Path(run_config.output_dir).glob("*"))


def test_a_run_whose_push_fails_says_where_its_concept_is(server, run_config, monkeypatch):
    monkeypatch.setattr(dreambooth, "validate", lambda *rest: setattr(server, "status", 503))
    config = dataclasses.replace(run_config, hub_token="hf_writer", hub_model_id="ada/x")
    place = Path(config.output_dir) / "teapot.atoms.safetensors"
    with pytest.raises(UserError, match=f"^{re.escape(str(place))} is saved, but: cannot push to ada/x: .*push_to_hub"):
        dreambooth.train(config)
    assert read_concept_file(place).trigger_phrase == "sks teapot"


def test_another_endpoint_is_taken_from_the_environment(server, concept, tmp_path):
    server.put("ada/mug", {"mug.atoms.safetensors": concept[0]})
    code = "import sys; from atomdiff.concepts import hub; print(hub.locate('ada/mug')[1])"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mug.atoms.safetensors"


def test_concepts_on_the_hub_are_exported(server, concept, tiny_pipe_folder, tmp_path):
    server.put("ada/mug", {"mug.atoms.safetensors": concept[0]})
    files = []
    for number, source in enumerate((str(concept[0]), "ada/mug")):
        config = ExportConfig(str(tiny_pipe_folder), (source,), "diff", str(tmp_path / f"{number}"))
        files.append(load_file(export_concepts(config).path))
    assert files[0] and files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
