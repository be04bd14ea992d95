"""Concepts are found on this disk and on the Hub, and nothing reaches the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import atomdiff
from atomdiff.concepts.push import write_repository
from atomdiff.sampling.concept_source import open_source
from atomdiff.utils.errors import UserError
from tests.fake_hub import point_client_at
from tests.helpers import predict


def test_a_word_alone_is_a_concept(hub_server, logged_in, lora, tiny_pipe):
    hub_server.put("ada/word", {"learned_embeds.safetensors": lora[0] / "learned_embeds.safetensors"})
    assert atomdiff.load_atoms(tiny_pipe, "ada/word") == "word"
    assert atomdiff.list_atoms(tiny_pipe)[0].trigger_words == ("sks",)


@pytest.mark.slow
def test_one_of_several_is_chosen_by_name_folder_and_revision(hub_server, concept, lora, tiny_pipe):
    file, _ = concept
    weights = lora[0] / "adapter_model.safetensors"
    first = hub_server.put("ada/many", {"a.atoms.safetensors": file})
    second = {"b.atoms.safetensors": file, "old/c.atoms.safetensors": file, "other.safetensors": file}
    hub_server.put("ada/many", {**second, "adapter_config.json": lora[0] / "adapter_config.json"})
    hub_server.put("ada/many", {"adapter_model.safetensors": weights})
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


@pytest.mark.slow
def test_a_folder_on_this_disk_is_chosen_from_in_the_same_way_and_goes_first(
    hub_server, concept, tiny_pipe, monkeypatch, tmp_path
):
    file, prediction = concept
    monkeypatch.chdir(file.parent.parent)
    assert atomdiff.load_atoms(tiny_pipe, "run") == "my_mug"
    assert torch.equal(predict(tiny_pipe, "a photo of sks mug"), prediction)
    atomdiff.unload_atoms(tiny_pipe)
    Path("ada/mug").mkdir(parents=True)
    (Path("ada/mug") / "one.atoms.safetensors").write_bytes(file.read_bytes())
    hub_server.put("ada/mug", {"of_the_hub.atoms.safetensors": file})
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug") == "one"
    atomdiff.unload_atoms(tiny_pipe)
    (Path("ada/mug") / "two.atoms.safetensors").write_bytes(file.read_bytes())
    several = "2 concepts: {}: one.atoms.safetensors, two.atoms.safetensors"
    with pytest.raises(UserError, match=several.format("choose one by weight_name")):
        atomdiff.load_atoms(tiny_pipe, "ada/mug")
    with pytest.raises(UserError, match=several.format("give the path of one .*")):  # commands have no such option
        open_source("ada/mug")
    with pytest.raises(UserError, match=several.format("give the path of one")):
        write_repository(tmp_path / "repository", "ada/mug", "ada/mug")
    assert atomdiff.load_atoms(tiny_pipe, "ada", subfolder="mug", weight_name="two.atoms.safetensors") == "two"
    assert not hub_server.asked


@pytest.mark.slow
def test_an_adapter_in_the_current_folder_has_its_name(lora, tiny_pipe, monkeypatch):
    monkeypatch.chdir(lora[0])
    assert atomdiff.load_atoms(tiny_pipe, ".") == "lora"


@pytest.mark.slow
def test_only_safetensors_and_json_are_downloaded(hub_server, concept, lora, tiny_pipe, tmp_path):
    evil = tmp_path / "evil.bin"
    evil.write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    code = tmp_path / "code.py"
    code.write_text("raise SystemExit")
    others = {"adapter_model.bin": evil, "pytorch_model.bin": evil, "modeling.py": code, "text_encoder/x.bin": evil}
    peft = {file.name: file for file in lora[0].glob("adapter_*")}
    hub_server.put("ada/lora", {**others, **peft})
    hub_server.put("ada/mug", {**others, "mug.atoms.safetensors": concept[0], "[a]*.atoms": evil})
    atomdiff.load_atoms(tiny_pipe, "ada/lora")
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, "ada/mug")
    got = {path.rpartition("/")[2] for path in hub_server.asked if path.startswith("GET") and "/resolve/" in path}
    assert got == {"adapter_config.json", "adapter_model.safetensors", "mug.atoms.safetensors"}
    for name in ("adapter_model.bin", "../evil.bin", "modeling.py"):
        with pytest.raises(UserError, match="only safetensors files are loaded"):
            atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name=name)
    with pytest.raises(UserError, match="has no '../x.safetensors'"):
        atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name="../x.safetensors")


def test_names_of_files_are_not_patterns(hub_server, concept, tiny_pipe):
    hub_server.put("ada/odd", {"[ab]*.atoms.safetensors": concept[0], "a.atoms.safetensors": concept[0]})
    atomdiff.load_atoms(tiny_pipe, "ada/odd", "odd", weight_name="[ab]*.atoms.safetensors")
    assert "GET /ada/odd/resolve/" not in " ".join(
        path for path in hub_server.asked if path.endswith("/a.atoms.safetensors")
    )


@pytest.mark.slow
def test_a_download_serves_when_the_hub_does_not(hub_server, concept, tiny_pipe, monkeypatch, tmp_path):
    file, prediction = concept
    hub_server.put("ada/mug", {"mug.atoms.safetensors": file, "README.md": file})
    with pytest.raises(UserError, match="'ada/mug', and .*: the Hub was not asked .* not in the cache; go online once"):
        atomdiff.load_atoms(tiny_pipe, "ada/mug", local_files_only=True)
    assert not hub_server.asked
    atomdiff.load_atoms(tiny_pipe, "ada/mug", cache_dir=tmp_path / "kept")
    asked = len(hub_server.asked)
    ways = {
        "not asked": lambda patch: None,
        "offline": lambda patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        "out of order": lambda patch: patch.setattr(hub_server, "status", 503),
        "not reached": lambda patch: point_client_at(patch, "http://127.0.0.1:1"),
    }
    for way, break_down in ways.items():
        with monkeypatch.context() as patch:
            break_down(patch)
            for choice in ({}, {"weight_name": "mug.atoms.safetensors"}):
                atomdiff.unload_atoms(tiny_pipe)
                local = {"local_files_only": way == "not asked", "cache_dir": tmp_path / "kept"}
                assert atomdiff.load_atoms(tiny_pipe, "ada/mug", **local, **choice) == "mug"
                assert torch.equal(predict(tiny_pipe, "a photo of sks mug"), prediction)
            with pytest.raises(UserError, match="does not answer"):
                atomdiff.load_atoms(tiny_pipe, "ada/other", local_files_only=way == "not asked")
    assert not any(path.startswith("GET /ada") for path in hub_server.asked[asked:])
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, "ada/mug", cache_dir=tmp_path / "kept", force_download=True)
    assert any(path.startswith("GET /ada") for path in hub_server.asked[asked:])


@pytest.mark.slow
def test_a_download_from_folders_within_folders_serves_as_well(hub_server, concept, lora, tiny_pipe):
    files = {file.relative_to(lora[0]).as_posix(): file for file in lora[0].rglob("*.*")}
    hub_server.put("ada/many", {f"pets/cat/{name}": file for name, file in files.items()})
    hub_server.put("ada/many", {"pets/dog/dog.atoms.safetensors": concept[0], "other.atoms.safetensors": concept[0]})
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
        ("x" * 300, {}, "there is no file or directory 'x+': check the path"),
        (".", {"subfolder": "x" * 300}, "x holds no concept: found nothing; expected"),
        ("a/b/c", {}, "there is no file or directory 'a/b/c': check the path"),
        (Path("ada/mug"), {}, "there is no file or directory 'ada/mug': check the path"),
    ],
)
def test_what_cannot_be_fetched_is_said(hub_server, concept, tiny_pipe, tmp_path, source, options, message):
    readme = tmp_path / "README.md"
    readme.write_text("empty")
    for name, settings in {"mug": {}, "secret": {"private": True}, "gated": {"gated": True}}.items():
        hub_server.put(f"ada/{name}", {"mug.atoms.safetensors": concept[0]}, **settings)
    hub_server.put("ada/empty", {"README.md": readme})
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, source, **options)
    assert not atomdiff.list_atoms(tiny_pipe)
    if "check the path" in message:
        assert not hub_server.asked
    if source in ("ada/secret", "ada/gated"):
        assert atomdiff.load_atoms(tiny_pipe, source, token="hf_reader") == "mug"


def test_a_file_and_the_name_of_another_do_not_go_together(concept, tiny_pipe):
    with pytest.raises(UserError, match="weight_name='other.safetensors' names one in a folder"):
        atomdiff.load_atoms(tiny_pipe, concept[0], weight_name="other.safetensors")
    assert atomdiff.load_atoms(tiny_pipe, concept[0], weight_name=concept[0].name) == "my_mug"


@pytest.mark.slow
def test_another_endpoint_is_taken_from_the_environment(hub_server, concept, tmp_path):
    hub_server.put("ada/mug", {"mug.atoms.safetensors": concept[0]})
    code = "import sys; from atomdiff.concepts import hub; print(hub.locate('ada/mug')[1])"
    environment = {**os.environ, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mug.atoms.safetensors"
