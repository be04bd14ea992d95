"""Fleets from end to end, on the tiny base."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from atomdiff.cli.main import main
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.training import dreambooth
from atomdiff.training.dreambooth import train
from atomdiff.training.fleet import fleet, workers
from atomdiff.training.fleet.fleet import train_fleet
from atomdiff.training.fleet.table import read_subjects
from atomdiff.utils.errors import UserError
from tests.helpers import assert_unchanged, concept_bytes, snapshot
from tests.training.fleet import sleeping_worker

ROOT = Path(__file__).parents[3]


def trained_alone(config, run, tmp_path):
    """The bytes of each subject's concept as `atomdiff train` alone makes it."""
    concepts = {}
    for name, own in [(each.name, each.run) for each in read_subjects(config, run)]:
        plain = {"output_dir": str(tmp_path / "alone" / name), "cache_dir": None, "resume_from_checkpoint": None}
        concepts[name] = [*concept_bytes(train(dataclasses.replace(own, **plain))).values()]
    return concepts


def library(config):
    """The bytes of each concept in a fleet's library."""
    files = (Path(config.output_dir) / "library").glob("*.atoms.safetensors")
    return {file.name.removesuffix(".atoms.safetensors"): [*concept_bytes(file).values()] for file in files}


def write_options(config, run, file):
    """Writes the options of a fleet to a file for --config."""
    options = {**run, **vars(config)}
    file.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v}))
    return str(file)


def wait_until(condition, seconds=120):
    """Wait for a condition and return what it gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


@pytest.fixture
def no_report(monkeypatch):
    """Runs draw no curves, which takes longer than their steps."""
    monkeypatch.setattr(dreambooth, "report", lambda *_: None)


@pytest.mark.slow
def test_a_fleet_trains_what_single_runs_train(same_process, table, fleet_config, run_values, tmp_path, monkeypatch):
    file = table("mug,cup,4,sks", "cat,cat,3,ohwx", columns=",class_name,max_train_steps,trigger_word")
    config, run = fleet_config(file, num_workers=2), run_values(validation_loss_steps=1)
    report = train_fleet(config, run)
    monkeypatch.setattr(dreambooth, "report", lambda *_: None)
    assert library(config) == trained_alone(config, run, tmp_path)
    concepts = ConceptLibrary(tmp_path / "fleet" / "library")
    assert [*concepts] == ["cat", "mug"] and concepts.find("ohwx cat") == ["cat"] and concepts.damaged == {}

    assert report.describe().startswith("2 subjects: 2 done; ") and report.num_workers == 2
    rows = {row["subject"]: row for row in csv.DictReader((tmp_path / "fleet" / "report.csv").open())}
    own = json.loads((tmp_path / "fleet" / "subjects" / "mug" / "training_report.json").read_text())
    assert (rows["mug"]["status"], rows["mug"]["tries"], rows["mug"]["error"]) == ("done", "1", "")
    assert rows["mug"]["verdict"] == ", ".join(each["verdict"] for each in own["findings"])
    assert int(rows["mug"]["file_bytes"]) == concepts.info("mug").path.stat().st_size
    assert float(rows["mug"]["base_drift"]) == own["measurements"][-1]["base_drift"] > 0
    told = json.loads((tmp_path / "fleet" / "report.json").read_text())
    assert told["subjects"] == report.subjects and told["tries"]["cat"][0]["error"] is None
    assert "| cat | done | 1 |" in (tmp_path / "fleet" / "report.md").read_text()


def test_the_base_is_loaded_once_and_stays_as_it_was(
    same_process, no_report, table, fleet_config, run_values, monkeypatch
):
    seen, usual = [], workers.load_base

    def load(run):
        pipe = usual(run)
        seen.append((pipe, snapshot(pipe)))
        return pipe

    monkeypatch.setattr(workers, "load_base", load)
    train_fleet(fleet_config(table("a", "b", "c")), run_values(max_train_steps=1, train_text_encoder=True))
    ((pipe, before),) = seen
    assert_unchanged(pipe, before)


def test_a_subject_that_fails_leaves_the_others_and_is_tried_again_by_the_next_call(
    same_process, no_report, table, fleet_config, run_values, tmp_path, capsys
):
    file = table("good", "bad", "fine")
    photo = tmp_path / "images" / "bad" / "1.png"
    kept = photo.read_bytes()
    photo.write_text("no image")
    config, run = fleet_config(file), run_values(max_train_steps=2)
    report = train_fleet(config, run)
    bad = report.subjects["bad"]
    assert (bad["status"], bad["tries"]) == ("failed", 2) and "1.png" in bad["error"]
    assert sorted(library(config)) == ["fine", "good"]
    told = capsys.readouterr().err
    assert "bad: failed: " in told and "it is tried again" in told and "2 of 3 done, 1 failed" in told

    photo.write_bytes(kept)
    trained = (tmp_path / "fleet" / "subjects" / "good" / "good.atoms.safetensors").stat().st_mtime_ns
    report = train_fleet(config, run)
    assert report.subjects["bad"]["status"] == "done" and report.subjects["bad"]["error"] is None
    assert report.subjects["bad"]["tries"] == 3
    assert (tmp_path / "fleet" / "subjects" / "good" / "good.atoms.safetensors").stat().st_mtime_ns == trained
    assert sorted(library(config)) == ["bad", "fine", "good"]
    assert "subjects done: 2, to train: 1" in capsys.readouterr().err


def test_a_bug_in_one_subject_is_kept_as_its_error(
    same_process, no_report, table, fleet_config, run_values, monkeypatch
):
    def break_down(run, base):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(workers, "train", break_down)
    report = train_fleet(fleet_config(table("a"), max_tries=1), run_values())
    assert report.subjects["a"]["error"] == "ZeroDivisionError: by zero" and report.subjects["a"]["tries"] == 1


def test_other_settings_are_refused_for_subjects_that_are_done(
    same_process, no_report, table, fleet_config, run_values, tmp_path, capsys
):
    config, run = fleet_config(table("a")), run_values(max_train_steps=1)
    train_fleet(config, run)
    more = {**run, "max_train_steps": 2}
    with pytest.raises(UserError, match=r"a: was trained with max_train_steps: 1, now 2: use its values, remove"):
        train_fleet(config, more)
    assert train_fleet(fleet_config(table("a", "b")), run).count("done") == 2  # a row more
    concept = tmp_path / "fleet" / "subjects" / "b" / "b.atoms.safetensors"
    concept.unlink()
    assert train_fleet(config, run).subjects["b"]["tries"] == 2 and concept.exists()
    table("a")
    file = tmp_path / "fleet" / "subjects" / "a" / "fleet.json"
    file.write_text(file.read_text().replace('"done"', '"running"'))
    assert train_fleet(config, more).count("done") == 1
    assert "a: begins anew, since its settings have changed: max_train_steps: 1, now 2" in capsys.readouterr().err
    file.write_text("{")
    with pytest.raises(UserError, match=r"fleet\.json: cannot be read .* remove it"):
        train_fleet(config, more)


def test_one_call_at_a_time_has_the_folder(same_process, table, fleet_config, run_values, tmp_path):
    with fleet.lock_folder(tmp_path / "fleet"), pytest.raises(UserError, match="another run is writing there"):
        train_fleet(fleet_config(table("a")), run_values())


def test_ctrl_c_ends_with_a_report_and_the_same_command_goes_on(
    same_process, no_report, table, fleet_config, run_values, monkeypatch
):
    config, run = fleet_config(table("a", "b")), run_values(max_train_steps=1)
    usual = fleet.Ledger.ended
    with monkeypatch.context() as patch:
        patch.setattr(fleet.Ledger, "ended", lambda *event: [usual(*event), signal.raise_signal(signal.SIGINT)])
        with pytest.raises(KeyboardInterrupt, match=r"stopped; 2 subjects: 1 done, 1 waiting; [^$]*goes on"):
            train_fleet(config, run)
    assert train_fleet(config, run).count("done") == 2


def test_what_was_trained_is_kept_where_no_worker_is_left(same_process, table, fleet_config, run_values, monkeypatch):
    config = fleet_config(table("a", "b"))
    usual, calls = fleet.Queue._take, []

    def lose(self, event):
        usual(self, event)
        calls.append(event)
        if [each.kind for each in calls].count("done") == 1:
            raise UserError("no worker can be started: no memory")

    monkeypatch.setattr(fleet.Queue, "_take", lose)
    with pytest.raises(UserError, match="no worker can be started"):
        train_fleet(config, run_values(max_train_steps=1))
    assert len(library(config)) == 1
    states = json.loads((Path(config.output_dir) / "report.json").read_text())
    assert "waiting" in json.dumps(states) and "running" not in json.dumps(states)


def test_a_base_that_cannot_be_loaded_is_told(same_process, table, fleet_config, run_values):
    with pytest.raises(UserError, match="no/such/base"):
        train_fleet(fleet_config(table("a")), run_values(pretrained_model_name_or_path="no/such/base"))


def test_a_missing_ray_is_told(table, fleet_config, run_values, monkeypatch, tmp_path, capsys):
    from atomdiff.training import launch

    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "ray" else object())
    options = write_options(fleet_config(table("a"), ray_address="auto"), run_values(), tmp_path / "run.yaml")
    assert main(["fleet", "--config", options]) == 2
    assert "ray_address='auto': ray is missing; pip install \"atomdiff[fleet]\"" in capsys.readouterr().err


def test_failed_subjects_are_the_exit_status(same_process, table, fleet_config, run_values, tmp_path, capsys):
    file = table("a", "b")
    (tmp_path / "images" / "b" / "0.png").write_text("no image")
    options = write_options(fleet_config(file), run_values(max_train_steps=1), tmp_path / "run.yaml")
    assert main(["fleet", "--config", options]) == 2
    told = capsys.readouterr()
    assert "2 subjects: 1 done, 1 failed; " in told.out and "failed subjects: 1; the report has" in told.err


def process_of(config, name, step=2):
    """The process that trains a subject, once it has done some steps."""
    folder = Path(config.output_dir) / "subjects" / name
    log = folder / "training_log.jsonl"

    def begun():
        lines = log.read_text().splitlines() if log.exists() else []
        return len(lines) >= step and (folder / ".lock").exists() and (folder / ".lock").read_text()

    return int(wait_until(begun).split()[1])


@pytest.mark.slow
def test_killed_workers_and_a_killed_driver_cost_nothing_but_time(
    same_process, no_report, table, fleet_config, run_values, tmp_path, capsys
):
    config = fleet_config(table("a", "b"))
    run = run_values(max_train_steps=25, checkpointing_steps=5)
    options = write_options(config, run, tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "atomdiff", "fleet", "--config", options]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        os.kill(process_of(config, "a", step=7), signal.SIGKILL)
        worker = process_of(config, "b")  # another one, in its place
        driver.send_signal(signal.SIGKILL)
        told = driver.communicate()[1]
    assert "a: failed: worker 0 was killed by signal 9" in told and "it is tried again" in told
    wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie")
    states = {name: json.loads((tmp_path / "fleet/subjects" / name / "fleet.json").read_text()) for name in "ab"}
    assert states["b"]["status"] == "running" and states["a"]["status"] == "waiting"

    assert main(["fleet", "--config", options]) == 0
    report = json.loads((tmp_path / "fleet" / "report.json").read_text())
    assert {each["status"] for each in report["subjects"].values()} == {"done"}
    assert report["subjects"]["a"]["tries"] == 2 and report["subjects"]["b"]["tries"] == 1
    assert ", 5 of them done" in capsys.readouterr().err
    assert library(config) == trained_alone(config, run, tmp_path)


@pytest.mark.slow
def test_a_worker_that_sleeps_is_killed_and_its_subject_goes_to_another(
    table, fleet_config, run_values, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(workers, "_serve", sleeping_worker.serve)
    report = train_fleet(fleet_config(table("a", "b", "c"), num_workers=2, worker_timeout=2.0), run_values())
    assert report.count("done") == 3 and report.subjects["a"]["tries"] == 2
    tries = json.loads((tmp_path / "fleet" / "report.json").read_text())["tries"]["a"]
    first, second = (each["worker"] for each in tries)
    assert first != second
    told = capsys.readouterr().err
    assert f"a: failed: worker {first} gave no sign of life for 2 seconds, and was killed; it is tried again" in told
    process = int((tmp_path / "fleet" / "subjects" / "a" / "process").read_text())
    wait_until(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == "zombie", seconds=10)


@pytest.mark.slow
def test_a_ray_cluster_trains_and_loses_workers(table, fleet_config, run_values, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = fleet_config(table("a", "b"), ray_address="local", num_workers=1, worker_timeout=15.0)
    run = run_values(max_train_steps=25)
    usual, signals = fleet.Ledger.started, {"a": signal.SIGKILL, "b": signal.SIGSTOP}

    def hit_once(self, name, worker):
        usual(self, name, worker)
        if number := signals.pop(name, None):
            threading.Thread(target=lambda: os.kill(process_of(config, name), number)).start()

    monkeypatch.setattr(fleet.Ledger, "started", hit_once)
    report = train_fleet(config, run)
    assert report.count("done") == 2 and [report.subjects[name]["tries"] for name in "ab"] == [2, 2]
    told = capsys.readouterr().err
    assert "a: failed: worker 0 was lost" in told
    assert "b: failed: worker 0 gave no sign of life for 15 seconds, and was killed" in told
    assert library(config) == trained_alone(config, run, tmp_path)
