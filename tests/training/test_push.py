"""A run pushes its concepts to the Hub."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import dreambooth
from atomdiff.training.validation_loss import FixedSamples
from atomdiff.utils.errors import UserError
from tests.fake_hub import card_of


@pytest.fixture
def run_config(train_config):
    prompts = ("a {trigger_word} {class_name}", "{trigger_word} in the city")
    return train_config(max_train_steps=2, validation_steps=1, validation_prompts=prompts, push_to_hub=True)


@pytest.mark.slow
def test_a_run_pushes_its_concept_with_the_last_validation_images(hub_server, run_config, tiny_pipe, capsys):
    config = dataclasses.replace(run_config, hub_token="hf_writer", hub_private_repo=True, report_to="tensorboard")
    written = dreambooth.train(config)
    assert f"pushed to {hub_server.url}/ada/teapot" in capsys.readouterr().out
    assert hub_server.repositories["ada/teapot"]["private"]
    data, _ = card_of(hub_server.files("ada/teapot")["README.md"].decode())
    assert [item["text"] for item in data["widget"]] == ["a sks teapot", "sks in the city"]
    assert all("step-000002" in item["output"]["url"] for item in data["widget"])
    assert data["instance_prompt"] == "sks teapot" and "base_model" not in data
    assert hub_server.files("ada/teapot")[written.name] == written.read_bytes()
    assert atomdiff.load_atoms(tiny_pipe, "ada/teapot", token="hf_writer") == "teapot"
    everything = [file.read_bytes() for file in Path(config.output_dir).rglob("*") if file.is_file()]
    assert not any(b"hf_writer" in content for content in [*everything, repr(config).encode()])


@pytest.mark.slow
def test_the_best_is_pushed_with_the_images_of_its_step(hub_server, run_config, monkeypatch):
    losses = iter([0.3, 0.1, 0.2])
    usual = FixedSamples.measure
    monkeypatch.setattr(
        FixedSamples, "measure", lambda *given: (usual(*given)[0] | {"validation_loss": next(losses)}, {"": 0.0})
    )
    fields = {"validation_split": 0.3, "validation_loss_steps": 1, "keep_best": True}
    dreambooth.train(dataclasses.replace(run_config, hub_token="hf_writer", **fields))
    data, _ = card_of(hub_server.files("ada/teapot")["README.md"].decode())
    assert data["widget"] and all("step-000001" in item["output"]["url"] for item in data["widget"])


@pytest.mark.slow
def test_every_concept_of_a_list_has_a_repository_of_its_own(hub_server, run_config, tmp_path):
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
    assert hub_server.repositories.keys() == {"ada/shelf-mug", "ada/shelf-rex"}
    for name, phrase in (("mug", "sks mug"), ("rex", "zwx robot")):
        files = hub_server.files(f"ada/shelf-{name}")
        assert f"{name}.atoms.safetensors" in files
        assert card_of(files["README.md"].decode())[0]["instance_prompt"] == phrase


@pytest.mark.slow
def test_a_folders_dots_stay_in_the_name_of_its_repository(hub_server, run_config, tmp_path):
    (tmp_path / "teapot").rename(tmp_path / "mug.v1")
    changes = {"instance_data_dir": str(tmp_path / "mug.v1"), "max_train_steps": 1, "validation_steps": 0}
    dreambooth.train(dataclasses.replace(run_config, hub_token="hf_writer", **changes))
    assert hub_server.repositories.keys() == {"ada/mug.v1"}


def test_a_run_that_cannot_push_does_not_start(hub_server, run_config, tmp_path):
    with pytest.raises(UserError, match="cannot push to teapot: nobody is logged in"):
        dreambooth.train(run_config)
    with pytest.raises(UserError, match="cannot push to ada/x: the token may only read"):
        dreambooth.train(dataclasses.replace(run_config, hub_model_id="ada/x", hub_token="hf_reader"))
    with pytest.raises(UserError, match="push_to_hub=True: a fully tuned pipeline is pushed by hand"):
        dreambooth.train(dataclasses.replace(run_config, adapter="full", hub_token="hf_writer"))
    assert not list(Path(run_config.output_dir).glob("*"))


def test_a_run_whose_push_fails_says_where_its_concept_is(hub_server, run_config, monkeypatch):
    monkeypatch.setattr(dreambooth, "validate", lambda *rest: setattr(hub_server, "status", 503))
    config = dataclasses.replace(run_config, hub_token="hf_writer", hub_model_id="ada/x")
    path = Path(config.output_dir) / "teapot.atoms.safetensors"
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is saved, but: cannot push to ada/x: .*push_to_hub"):
        dreambooth.train(config)
    assert read_concept_file(path).trigger_phrase == "sks teapot"
