"""Records of runs, and runs that are repeated by them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from atomdiff.cli.main import main
from atomdiff.training.config.rerun import RerunConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.rerun import repeat_run
from atomdiff.training.run_comparison import RunComparison, compare_runs, compare_tensors
from atomdiff.training.run_record import RECORD_FILE, read_record
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from tests.helpers import concept_bytes, write_images


@pytest.fixture
def short(train_config, monkeypatch):
    """Makes configs of runs of two steps, whose reports have no pages."""
    from atomdiff.training.report import write

    monkeypatch.setattr(write, "write_pages", lambda *_: None)
    return lambda **fields: train_config(**{"max_train_steps": 2, "checkpointing_steps": 0} | fields)


def edit_record(folder, **changes):
    file = Path(folder) / RECORD_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_record_says_what_a_run_was(short, tmp_path):
    config = short(learning_rate=0.01, hub_token="hf_secret", validation_split=0.3, validation_loss_steps=2)
    path = train(config)
    text = (Path(config.output_dir) / RECORD_FILE).read_text()
    record = read_record(Path(config.output_dir))
    assert "hf_secret" not in text and record.working_directory == os.getcwd()
    assert record.config["instance_data_dir"] == config.instance_data_dir and record.config["learning_rate"] == 0.01
    assert record.settings["token_learning_rate"] == 0.01 and record.settings["adapter"]["peft_type"] == "ATOMS"
    assert record.settings["mixed_precision"] == "no" and record.settings["num_processes"] == 1
    assert [len(record.data[kind]) for kind in ("instance_images", "held_out_images", "class_images")] == [2, 1, 0]
    assert record.data["base"].keys() >= {"unet", "vae", "text_encoder"}
    assert record.environment["packages"]["torch"] == torch.__version__
    assert "threads" in record.environment["processor"] and record.environment["device"]
    assert record.result["sha256"] == hash_file(path) and (record.result["name"], record.result["step"]) == (
        path.name,
        2,
    )


def test_a_repeated_run_is_equal_to_the_byte(short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = short(instance_data_dir="teapot", output_dir="out/teapot", validation_split=0.3, validation_loss_steps=1)
    write_images(tmp_path / "teapot")
    path = (tmp_path / train(config)).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["rerun", str(tmp_path / "out" / "teapot")]) == 0
    repeated = tmp_path / "out" / "teapot-rerun"
    assert concept_bytes(repeated / path.name) == concept_bytes(path)
    compared = json.loads((repeated / "rerun.json").read_text())
    assert compared["equal"] and not compared["result_changed"]
    assert not any(compared[name] for name in ("settings", "data", "environment"))
    assert {name: loss["steps"] for name, loss in compared["losses"].items()} == {"loss": 2, "validation_loss": 3}
    told = capsys.readouterr().out
    assert "settings: the same" in told and "validation loss: the same at all 3 noted steps" in told
    assert "result: equal to the byte" in told and Path.cwd() == tmp_path / "elsewhere"


def test_what_differs_is_named(short, tmp_path):
    first = Path(train(short(output_dir=str(tmp_path / "a"), max_train_steps=1))).parent
    second = Path(train(short(output_dir=str(tmp_path / "b"), max_train_steps=1, learning_rate=0.02))).parent
    edit_record(first, environment=read_record(first).environment | {"python": "3.9.0"})
    compared = compare_runs(first, second)
    assert not compared.is_equal and compared.data == []
    assert "learning_rate: 0.005, now 0.02" in compared.settings
    assert len(compared.environment) == 1 and compared.environment[0].startswith("python: '3.9.0', now '3.1")
    assert compared.losses["loss"].first_step is None  # the parameters had not moved yet
    result = compared.result
    assert 0 < result.different <= result.tensors and result.largest > 1e-3 and result.relative > 1e-3
    assert f"{result.different} of {result.tensors} tensors differ" in compared.describe()
    (concept,) = first.glob("*.atoms.safetensors")
    shutil.copy(second / concept.name, concept)
    changed = compare_runs(first, second)
    assert changed.result_changed and changed.result.equal
    concept.unlink()
    assert compare_runs(first, second).result is None


def test_tensors_are_compared_one_by_one(tmp_path):
    for name, value, metadata in (("a", 1.0, {"x": "1"}), ("b", 1.5, {"x": "1"}), ("c", 1.0, {"x": "2"})):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([3.0, value]), "v": torch.zeros(2)}, tmp_path / name / "f.safetensors", metadata)
    assert compare_tensors(tmp_path / "a", tmp_path / "a").equal
    apart = compare_tensors(tmp_path / "a", tmp_path / "b")
    assert (apart.equal, apart.tensors, apart.different, apart.unmatched, apart.largest) == (False, 2, 1, 0, 0.5)
    assert apart.relative == pytest.approx(0.5 / 10**0.5)
    only_metadata = compare_tensors(tmp_path / "a", tmp_path / "c")
    assert (only_metadata.equal, only_metadata.different) == (False, 0)
    save_file({**load_file(tmp_path / "a" / "f.safetensors"), "new": torch.ones(1)}, tmp_path / "b" / "f.safetensors")
    more = compare_tensors(tmp_path / "a", tmp_path / "b")
    assert (more.equal, more.tensors, more.different, more.unmatched, more.largest) == (False, 3, 1, 1, 0)
    compared = {
        name: RunComparison([], [], [], {}, found)
        for name, found in {"apart": apart, "metadata": only_metadata, "more": more, "gone": None}.items()
    }
    agreeing = {0.0: [], 0.1: ["metadata"], 0.2: ["apart", "metadata"]}
    for tolerance, expected in agreeing.items():
        assert [name for name, each in compared.items() if each.agrees(tolerance)] == expected


def test_images_that_changed_are_refused_or_named(short, tmp_path, teapot_images):
    folder = Path(train(short())).parent
    Image.new("RGB", (32, 32), "red").save(teapot_images / "1.png")
    (teapot_images / "2.txt").write_text("sks teapot on a table")
    options = {"folder": str(folder), "output_dir": str(tmp_path / "again")}
    with pytest.raises(UserError, match=r"changed: 1.png; caption changed: 2.png.*--allow_changes"):
        repeat_run(RerunConfig(**options))
    assert not list((tmp_path / "again").glob("*.safetensors"))
    asked = ["rerun", options["folder"], "--output_dir", options["output_dir"], "--allow_changes"]
    assert main(asked) == 3
    compared = json.loads((tmp_path / "again" / "rerun.json").read_text())
    assert "1.png" in compared["data"][0] and not compared["equal"] and not compared["settings"]

    write_images(tmp_path / "moved", widths=(32, 40, 48))
    shutil.rmtree(teapot_images)
    with pytest.raises(UserError, match=r"found no folder .*teapot; expected the images of that.*instance_data_dir"):
        repeat_run(RerunConfig(**options))
    moved = repeat_run(RerunConfig(**options, instance_data_dir=str(tmp_path / "moved")))
    assert moved.data == [] and not moved.result.different  # the concept is named like the folder


def test_another_base_is_refused(short, tmp_path, tiny_pipe):
    folder = Path(train(short())).parent
    tiny_pipe.unet.conv_in.bias.data.add_(1)
    tiny_pipe.save_pretrained(tmp_path / "other")
    config = RerunConfig(folder=str(folder), pretrained_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"found another base \(unet\); expected what that run learned from"):
        repeat_run(config)


def test_a_run_of_two_processes_is_repeated_with_as_many_batches(short, tmp_path):
    config = short(gradient_accumulation_steps=2)
    folder = Path(train(config)).parent
    record = read_record(folder)
    edit_record(
        folder,
        config=record.config | {"gradient_accumulation_steps": 1},
        settings=record.settings | {"gradient_accumulation_steps": 1, "num_processes": 2},
    )
    compared = repeat_run(RerunConfig(folder=str(folder)))
    assert compared.is_equal
    assert compared.settings == ["gradient_accumulation_steps: 1, now 2", "num_processes: 2, now 1"]


def test_what_cannot_be_repeated_is_told(short, tmp_path):
    with pytest.raises(UserError, match=r"found no run_record.json; expected the output_dir of a run"):
        repeat_run(RerunConfig(folder=str(tmp_path)))
    folder = Path(train(short(max_train_steps=1))).parent
    with pytest.raises(UserError, match=r"found no run_record.json.*; it is in out: name one of them"):
        repeat_run(RerunConfig(folder=str(tmp_path)))
    with pytest.raises(UserError, match=r"output_dir=.* is the run that is repeated"):
        repeat_run(RerunConfig(folder=str(folder), output_dir=str(folder)))
    classified = tmp_path / "classified"
    (classified / "classifier").mkdir(parents=True)
    with pytest.raises(UserError, match=r"found no run_record.json.*; runs of `atomdiff classify` leave none: run it"):
        repeat_run(RerunConfig(folder=str(classified)))
    record = read_record(folder)
    for changes, message in (
        ({"result": None}, "this run has not ended; resume it"),
        ({"config": record.config | {"sparkle": 1}}, "options that this version lacks: sparkle.*atomdiff 0.1.0"),
        ({"format": 7}, "of another version of atomdiff, or damaged; expected format 1"),
    ):
        edit_record(folder, **dict(dataclasses.asdict(record), format=1) | changes)
        with pytest.raises(UserError, match=message):
            repeat_run(RerunConfig(folder=str(folder)))
    (folder / RECORD_FILE).write_text("{")
    with pytest.raises(UserError, match=r"run_record.json: cannot be read"):
        repeat_run(RerunConfig(folder=str(folder)))
