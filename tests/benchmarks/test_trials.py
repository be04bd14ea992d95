"""Trials and their runner in miniature, on the tiny base."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from atomdiff.training import dreambooth
from benchmarks import trial_runner, trials
from benchmarks.compare_methods import run_key
from benchmarks.trial_runner import Runner
from benchmarks.trials import fingerprint

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-sd"
ADAPTER_FIELDS = {"peft_type": "ATOMS", "target_modules": "conv", "channel_block": 1}
EDITS = {"images_per_prompt": 1, "prompts": [{"prompt": "a red {subject}", "color": "red"}]}


def changed(trial, name, world):
    """A trial that differs in what is named; some of it on the disk."""
    path = world.path
    if name in ("photos", "other photos"):
        Image.new("RGB", (32, 32), "red").save(path / "subjects" / ("mug" if name == "photos" else "robot") / "0.png")
    if name == "protocols":
        (path / "edits.yaml").write_text(yaml.safe_dump({**EDITS, "images_per_prompt": 2}))
    if name == "base":
        shutil.copytree(TINY, path / "base")
        (path / "base" / "scheduler" / "other.json").write_text("{}")
        run = yaml.safe_load((path / "run.yaml").read_text())
        (path / "run.yaml").write_text(yaml.safe_dump({**run, "pretrained_model_name_or_path": str(path / "base")}))
    if name == "adapter":
        return dataclasses.replace(trial, adapter={**ADAPTER_FIELDS, "basis": "dct"})
    if name == "run settings":
        return dataclasses.replace(trial, options={**trial.options, "seed": 4})
    if name == "sampling":
        return dataclasses.replace(trial, options={**trial.options, "num_inference_steps": 2})
    return trial


@pytest.mark.parametrize("name", ["base", "adapter", "run settings", "photos", "other photos", "protocols", "sampling"])
def test_a_fingerprint_tells_what_has_changed(name, trial, world):
    before = fingerprint(trial)
    assert fingerprint(dataclasses.replace(trial, folder=str(world.path / "elsewhere"))) == before
    after = fingerprint(changed(trial, name, world))
    assert [key for key in before if before[key] != after[key]] == [name]


def test_texts_beside_weights_and_options_with_their_defaults_are_no_change(trial, world):
    before = fingerprint(trial)
    (world.path / "subjects" / "mug" / "README.md").write_text("a mug")
    assert fingerprint(dataclasses.replace(trial, options={**trial.options, "lr_num_cycles": 1})) == before


def test_images_that_a_run_shows_on_the_way_are_no_change(trial, world):
    before, file, key = fingerprint(trial), world.path / "run.yaml", run_key(trial.run)
    shown = {"validation_steps": 1, "validation_prompts": ["a photo of {trigger_word} {class_name} in the snow"]}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | shown))
    assert fingerprint(trial) == before and trial.config().validation_steps == 0
    assert run_key(trial.run) == key
    asked = dataclasses.replace(trial, options={**trial.options, "validation_steps": 2})
    assert asked.config().validation_steps == 2


@pytest.mark.slow
def test_a_trial_is_done_once_and_again_when_something_has_changed(trial, world, capsys):
    (first,) = Runner().run([trial])
    assert first["status"] == "done" and first["kind"] == "in span" and first["precision"] == "float32 on cpu"
    assert first["parameters"] > 0 and first["bytes"] > first["parameters"] and first["peak_memory_bytes"] > 1e7
    assert 0 <= first["top_1"] <= 1 and [*first["metrics"]] == ["places", "edits"]
    assert first["metrics"]["edits"]["color_accuracy"]["concept"]["count"] == 1
    assert not [*Path(trial.folder).rglob("checkpoint-*")]
    assert Runner().run([trial]) == [first] and len(world.started) == 1

    other = dataclasses.replace(trial, folder=str(world.path / "other"), options={**trial.options, "seed": 4})
    images = {file: file.stat().st_mtime_ns for file in world.path.glob("shared/base-*-images/*.png")}
    Runner().run([other])
    assert images == {file: file.stat().st_mtime_ns for file in world.path.glob("shared/base-*-images/*.png")}

    (again,) = Runner().run([dataclasses.replace(trial, options={**trial.options, "learning_rate": 0.05})])
    assert again["fingerprint"] != first["fingerprint"] and len(world.started) == 3
    assert again["metrics"]["places"]["drift"]["mean"] > first["metrics"]["places"]["drift"]["mean"] > 0
    assert "run again, with other run settings" in capsys.readouterr().out


def test_with_another_sampling_images_are_made_again_from_what_was_trained(trial):
    trial_runner._prepare(trial, fingerprint(trial), 1)
    kept, images = Path(trial.folder) / "run", Path(trial.folder) / "places"
    kept.mkdir()
    images.mkdir()
    other = dataclasses.replace(trial, options={**trial.options, "guidance_scale": 9.0})
    trial_runner._prepare(other, fingerprint(other), 1)
    assert kept.is_dir() and not images.exists()


@pytest.mark.slow
def test_a_trial_has_a_process_of_its_own(trial, world, monkeypatch):
    monkeypatch.undo()
    short = dataclasses.replace(trial, protocols=trial.protocols[:1])
    (result,) = Runner().run([short])
    assert result["status"] == "done" and result["peak_memory_bytes"] > 1e8
    assert "training: 2 steps" in (Path(trial.folder) / "log.txt").read_text()
    assert result["fingerprint"] == fingerprint(short)


@pytest.mark.slow
def test_what_was_trained_is_not_trained_again_when_only_the_evaluation_was_stopped(trial, world, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(trials, "_evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            Runner().run([trial])
    assert not (Path(trial.folder) / "result.json").exists()
    monkeypatch.setattr(trials, "_train", stop)
    (first,) = Runner().run([trial])
    assert first["status"] == "done" and [*first["metrics"]["edits"]["color_accuracy"]["concept"].values()][-1] == 1

    (again,) = Runner().run([changed(trial, "protocols", world)])  # a change of the evaluation alone
    assert again["metrics"]["edits"]["color_accuracy"]["concept"]["count"] == 2
    assert again["metrics"]["places"] == first["metrics"]["places"]
    with pytest.raises(KeyboardInterrupt):
        Runner().run([changed(trial, "photos", world)])


@pytest.mark.slow
def test_a_failed_evaluation_costs_no_training_when_it_is_retried(trial, monkeypatch):
    def fail(*_):
        raise RuntimeError("no judge")

    with monkeypatch.context() as broken:
        broken.setattr(trials, "_evaluate", fail)
        (failed,) = Runner().run([trial])
    assert failed["status"] == "failed" and failed["message"] == "no judge"
    link = Path(trial.folder) / "places" / "images" / "base"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(trial.folder) / "moved")
    monkeypatch.setattr(trials, "_train", fail)
    (result,) = Runner(retry_failed=True).run([trial])
    assert result["status"] == "done" and link.is_symlink() and any(link.iterdir())


@pytest.mark.slow
def test_a_stopped_training_goes_on_from_its_checkpoint(trial, world, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    trial = dataclasses.replace(trial, options={**trial.options, "checkpointing_steps": 1})
    with monkeypatch.context() as stopped:
        stopped.setattr(dreambooth, "save_result", stop)
        with pytest.raises(KeyboardInterrupt):
            Runner().run([trial])
    assert [*Path(trial.folder).rglob("checkpoint-2")]
    (result,) = Runner().run([trial])
    assert result["status"] == "done" and "2 (2 of them done)" in capsys.readouterr().err
    assert not [*Path(trial.folder).rglob("checkpoint-*")]


@pytest.mark.slow
def test_a_failed_trial_stays_failed_with_its_message_until_it_is_to_be_retried(trial, world, capsys):
    broken = dataclasses.replace(trial, adapter={"peft_type": "LORA", "target_modules": ["nowhere"]})
    (result,) = Runner().run([broken])
    assert result["status"] == "failed" and "nowhere" in result["message"]
    assert Runner().run([broken]) == [result] and len(world.started) == 1
    Runner(retry_failed=True).run([broken])
    assert len(world.started) == 2 and "failed: " in capsys.readouterr().out


def without_world(monkeypatch, command):
    """A runner whose trials are another program."""
    monkeypatch.undo()
    monkeypatch.setattr(trial_runner, "fingerprint", lambda trial: {"base": "a"})
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", command], **options))


def test_a_process_that_is_killed_is_a_failed_trial(trial, monkeypatch):
    without_world(monkeypatch, "import os; print('3/10 steps', flush=True); os.kill(os.getpid(), 9)")
    (result,) = Runner().run([trial])
    assert result["status"] == "failed" and "ended by signal 9" in result["message"] and "3/10" in result["message"]


def test_a_process_that_is_stopped_leaves_no_result_and_is_the_last(trial, world, monkeypatch):
    without_world(monkeypatch, "raise SystemExit(130)")
    with pytest.raises(KeyboardInterrupt):
        Runner().run([trial, dataclasses.replace(trial, folder=str(world.path / "other"))])
    assert not (Path(trial.folder) / "result.json").exists() and not (world.path / "other").exists()


def test_a_stop_before_all_trials_are_in_the_queue_stops_them(trial, world, monkeypatch):
    without_world(monkeypatch, "import time; time.sleep(20)")
    folders = iter("ab")

    def queue(trial):
        if next(folders, None) is None:
            raise KeyboardInterrupt
        return {"base": "a"}

    monkeypatch.setattr(trial_runner, "fingerprint", queue)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Runner().run([dataclasses.replace(trial, folder=str(world.path / name)) for name in "abc"])
    assert time.monotonic() - started < 15


def test_sigterm_stops_all_trials_that_run(trial, world, monkeypatch):
    mark = world.path / "running"
    without_world(monkeypatch, f"import time; open({str(mark)!r}, 'a').write('x'); time.sleep(60)")
    others = [dataclasses.replace(trial, folder=str(world.path / name)) for name in "abcd"]
    started = time.monotonic()

    def terminate():
        while not mark.exists() or mark.read_text() != "xx":
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        Runner(processes=2).run(others)
    killer.join()
    assert time.monotonic() - started < 30 and mark.read_text() == "xx"
    assert not [*world.path.glob("?/result.json")]
