"""Runs that go on where they stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atomdiff.cli.main import main
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import run_log
from atomdiff.training.dreambooth import train
from atomdiff.utils.errors import UserError
from tests.helpers import concept_bytes, read_log, stop_at, write_images


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "shared", "lora"])
def test_a_run_that_was_asked_to_stop_ends_with_the_same_bytes(config, method, adapter_file, tmp_path, monkeypatch):
    config = dataclasses.replace(
        config, adapter=adapter_file(method), lr_scheduler="cosine", gradient_accumulation_steps=2
    )
    expected = concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))

    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-2 is saved: .*--resume_from_checkpoint latest"):
            train(config)
    assert concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="latest"))) == expected
    assert [line["step"] for line in read_log(config)] == [3, 4]


@pytest.mark.slow
def test_finished_subjects_of_a_list_are_not_trained_again(tiny_pipe_folder, tmp_path, capsys):
    for name in ("mug", "cat"):
        write_images(tmp_path / name, seed=len(name))
    entries = [{"instance_data_dir": str(tmp_path / name)} for name in ("mug", "cat")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    fields = {"concepts_list": str(tmp_path / "list.json"), "output_dir": str(tmp_path / "out"), "max_train_steps": 3}
    fields |= {"pretrained_model_name_or_path": str(tiny_pipe_folder), "class_name": "mug", "validation_loss_steps": 0}
    (tmp_path / "train.json").write_text(json.dumps(fields | {"report_to": None, "num_inference_steps": 2}))
    command = ["train", "--config", str(tmp_path / "train.json")]
    assert main(command) == 0
    results = {name: tmp_path / "out" / name / f"{name}.atoms.safetensors" for name in ("mug", "cat")}
    before = {name: (file.stat().st_mtime_ns, concept_bytes(file)) for name, file in results.items()}
    results["cat"].unlink()
    capsys.readouterr()
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0
    shown = capsys.readouterr()
    assert "mug: finished already" in shown.err and "cat: finished already" not in shown.err
    assert results["mug"].stat().st_mtime_ns == before["mug"][0] and concept_bytes(results["cat"]) == before["cat"][1]
    assert main([*command, "--resume_from_checkpoint", "latest", "--learning_rate", "0.01"]) == 0
    assert concept_bytes(results["mug"]) != before["mug"][1]


KILLED = """
import os, signal, sys
from atomdiff.training import dreambooth, run_log

def die(self, step, *values):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

run_log.RunLog.step = die
dreambooth.train(dreambooth.load_config(["--config", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(config, half_precision, tmp_path):
    config = dataclasses.replace(
        config,
        max_train_steps=7,
        checkpointing_steps=2,
        with_prior_preservation=True,
        num_class_images=3,
        class_data_dir=str(tmp_path / "class"),
        mixed_precision=half_precision,
    )
    fields = {**dataclasses.asdict(config), "validation_prompts": list(config.validation_prompts)}
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    root, threads = Path(__file__).parents[2], str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": threads}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.yaml")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    left = (".lock", "run_record.json", "training_log.jsonl")
    assert sorted(file.name for file in Path(config.output_dir).iterdir() if file.name not in left) == [
        "cache",
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="latest")))
    assert concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))) == resumed


@pytest.mark.slow
def test_a_checkpoint_becomes_a_concept_by_stopping_there(config, tmp_path):
    config = dataclasses.replace(config, checkpointing_steps=2)
    train(config)
    there = dataclasses.replace(config, resume_from_checkpoint="checkpoint-2", max_train_steps=2)
    short = dataclasses.replace(config, output_dir=str(tmp_path / "short"), max_train_steps=2)
    early, alike = train(there), train(short)
    trainings = [read_concept_file(file).training for file in (early, alike)]
    assert [each["config"].pop("max_train_steps") for each in trainings] == [
        4,
        2,
    ]  # those of the run that it learned in
    assert trainings[0] == trainings[1] and trainings[0]["steps"] == 2
    one, other = load_file(early), load_file(alike)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_processes_may_change_if_the_batches_of_a_step_do_not(config):
    one = dataclasses.replace(config, checkpointing_steps=2, gradient_accumulation_steps=2)
    expected = concept_bytes(train(one))
    file = Path(config.output_dir) / "checkpoint-2" / "run.json"
    record = json.loads(file.read_text())
    assert record["config"]["num_processes"] == 1
    record["config"] |= {"num_processes": 2, "gradient_accumulation_steps": 1}
    file.write_text(json.dumps(record))
    assert concept_bytes(train(dataclasses.replace(one, resume_from_checkpoint="checkpoint-2"))) == expected
    other = dataclasses.replace(one, resume_from_checkpoint="checkpoint-2", gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="_steps=1 on 2 .*, now .*=1 on 1 .*use gradient_accumulation_steps=2"):
        train(other)


@pytest.mark.slow
def test_a_checkpoint_beyond_the_last_step_is_refused(config):
    train(dataclasses.replace(config, checkpointing_steps=4))
    again = dataclasses.replace(config, resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(UserError, match="max_train_steps=2, but .*checkpoint-4 is at step 4"):
        train(again)


@pytest.fixture
def stopped(config, tmp_path):
    """A run that is to go on from its second step, with masks; its images, in a folder of their own; and its result."""
    folder = tmp_path / "mine" / "teapot"
    shutil.copytree(config.instance_data_dir, folder)
    (folder / "mask").mkdir()
    for file in folder.glob("*.png"):
        Image.new("L", Image.open(file).size, 255).save(folder / "mask" / file.name)
    config = dataclasses.replace(config, instance_data_dir=str(folder), masked_loss=True, max_train_steps=2)
    config = dataclasses.replace(config, checkpointing_steps=2)
    path = train(config)
    return dataclasses.replace(config, resume_from_checkpoint="latest"), folder, path


def another_image(folder):
    Image.effect_noise(Image.open(folder / "1.png").size, 90).convert("RGB").save(folder / "1.png")


def a_new_image(folder):
    shutil.copy(folder / "1.png", folder / "9.png")
    shutil.copy(folder / "mask" / "1.png", folder / "mask" / "9.png")
    Image.effect_noise(Image.open(folder / "9.png").size, 90).convert("RGB").save(folder / "9.png")


def another_caption(folder):
    (folder / "0.txt").write_text("a blue sks teapot")


def another_mask(folder):
    mask = Image.open(folder / "mask" / "2.png")
    mask.putpixel((3, 3), 0)
    mask.save(folder / "mask" / "2.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_image, r"other instance images \(changed: 1.png\)"),
        (a_new_image, r"other instance images \(new: 9.png\)"),
        (another_caption, r"other instance images \(caption changed: 0.png\)"),
        (another_mask, r"other instance images \(mask changed: 2.png\)"),
    ],
)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_goes_on_with_what_it_began_with_only(stopped, change, message, steps):
    config, folder, path = stopped
    change(folder)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"checkpoint-2: written with {message}. Restore .*another output_dir"):
        train(dataclasses.replace(config, max_train_steps=steps))
    assert path.read_bytes() == before


def test_another_base_of_the_same_shape_is_refused(stopped, tiny_pipe, tmp_path):
    config, _, path = stopped
    before = path.read_bytes()
    tiny_pipe.unet.conv_in.bias.data[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"checkpoint-2: written with another base \(unet\)"):
        train(dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "other")))
    assert path.read_bytes() == before


def test_the_same_images_and_base_may_lie_elsewhere_and_the_run_go_on_for_longer(stopped, tiny_pipe_folder, tmp_path):
    config, folder, _ = stopped
    shutil.copytree(tiny_pipe_folder, tmp_path / "copied base")
    folder = folder.rename(tmp_path / "mine" / "moved")
    for name in ("0.png", "mask/0.png"):
        (folder / name).rename((folder / name).with_name("00.png"))
    moved = {"instance_data_dir": str(folder), "pretrained_model_name_or_path": str(tmp_path / "copied base")}
    path = train(dataclasses.replace(config, max_train_steps=3, **moved))
    assert read_concept_file(path).training["steps"] == 3


@pytest.mark.slow
def test_a_file_that_no_step_was_done_for_says_how_it_was_trained(stopped):
    config, _, path = stopped
    before = read_concept_file(path).training
    train(dataclasses.replace(config, learning_rate=0.7, lr_scheduler="cosine"))
    assert read_concept_file(path).training == before


def test_a_checkpoint_with_other_parameters_is_refused(stopped):
    config, _, _ = stopped
    file = Path(config.output_dir) / "checkpoint-2" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["parameters"][next(iter(state["parameters"]))]
    torch.save(state, file)
    with pytest.raises(UserError, match="checkpoint-2: written by another version, with other parameters"):
        train(config)


@pytest.mark.slow
def test_checkpoints_that_cannot_be_written_cost_only_themselves(config, small_files):
    config = dataclasses.replace(config, checkpointing_steps=2)
    expected = concept_bytes(train(config))
    size = (Path(config.output_dir) / "checkpoint-2" / "state.pt").stat().st_size
    before = {file: file.read_bytes() for file in Path(config.output_dir).glob("checkpoint-*/*")}
    message = r"step 2: .*checkpoint-2: cannot be written \(File too large\)"
    with small_files(size - 100), pytest.warns(UserWarning, match=message):
        assert concept_bytes(train(config)) == expected
    assert {file: file.read_bytes() for file in Path(config.output_dir).glob("checkpoint-*/*")} == before
    assert not [file for file in Path(config.output_dir).iterdir() if "unfinished" in file.name]


def test_what_cannot_be_saved_stays_in_a_checkpoint(config, tiny_pipe_folder, tmp_path, monkeypatch):
    config = dataclasses.replace(config, checkpointing_steps=0)
    expected = concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))
    base = tmp_path / "base"
    shutil.copytree(tiny_pipe_folder, base)
    usual = run_log.RunLog.step

    def remove_base(self, step, *values):
        usual(self, step, *values)
        if step == 4:
            shutil.rmtree(base)

    monkeypatch.setattr(run_log.RunLog, "step", remove_base)
    with pytest.raises(UserError, match="base.*; what was trained is in .*checkpoint-4: then resume with"):
        train(dataclasses.replace(config, pretrained_model_name_or_path=str(base)))
    assert concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="latest"))) == expected
