"""Trials, the comparison of methods, its report, the screening and the sheets in miniature, on the tiny base."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from atomdiff.evaluate.suite import generate_images
from atomdiff.training import dreambooth
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from benchmarks import compare_methods, experiments, methods_report, sampling, screening, sheets, trial_runner, trials
from benchmarks.compare_methods import CompareConfig, describe_runs, quick_config
from benchmarks.experiments import EXPERIMENTS, MOST_TELLING, all_methods, ordered_methods, read_adapter_fields
from benchmarks.methods_plots import Point, draw_frontier, draw_tradeoffs, frontier
from benchmarks.recognition import Gallery
from benchmarks.screening_changes import Change
from benchmarks.trial_figures import (
    check_protocols,
    choose_rate,
    search_rate,
    summarize,
    summarize_kinds,
    trial_figures,
)
from benchmarks.trial_runner import Runner
from benchmarks.trials import Trial, fingerprint, run_trial
from tests.helpers import write_images

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-sd"
ADAPTER_FIELDS = {"peft_type": "ATOMS", "target_modules": "conv", "channel_block": 1}
PLACES = """
images_per_prompt: 2
prompts:
  in span: &prompts
    - {prompt: "a photo of {subject} in the snow", scene: snow}
    - {prompt: "a photo of {subject} on the beach", scene: beach}
  hard: *prompts
prior_prompts: ["a photo of {subject}"]
unrelated_prompts: [a photo of a cat]
"""
SUBJECTS = {"mug": {"class_name": "mug", "prompts": "in span"}, "robot": {"class_name": "robot", "prompts": "hard"}}
EDITS = {"images_per_prompt": 1, "prompts": [{"prompt": "a red {subject}", "color": "red"}]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Photos of two subjects and one to tune on, protocols, and a run of two steps; trials run in this process."""
    for number, (folder, name) in enumerate([("subjects", "mug"), ("subjects", "robot"), ("tuning", "cat")]):
        write_images(tmp_path / folder / name, (32, 32), seed=number)
        write_images(tmp_path / folder / name / "unseen", (32, 32), seed=10 + number)
    tuning = {"subjects": {"cat": {"class_name": "cat", "prompts": "hard"}}}
    run = {"pretrained_model_name_or_path": str(TINY), "train_token": True, "token_learning_rate": 0.02}
    run |= {"train_batch_size": 1, "max_train_steps": 2, "logging_steps": 1, "num_inference_steps": 1}
    files = {"places": PLACES + yaml.safe_dump({"subjects": SUBJECTS}), "tuning": PLACES + yaml.safe_dump(tuning)}
    files |= {"edits": yaml.safe_dump(EDITS), "run": yaml.safe_dump(run)}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(Runner, "_start", lambda self, folder: started.append(folder) or run_trial(folder))
    started = []
    return SimpleNamespace(path=tmp_path, started=started)


@pytest.fixture
def trial(world):
    path = world.path
    return Trial(
        str(path / "trial"),
        str(path / "subjects" / "mug"),
        ADAPTER_FIELDS,
        {"learning_rate": 0.01, "seed": 3},
        (str(path / "places.yaml"), str(path / "edits.yaml")),
        str(path / "run.yaml"),
        str(path / "shared"),
    )


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


def compare_config(world, **changes):
    path = world.path
    return CompareConfig(
        **{
            "methods": ("token/default",),
            "seeds": (0,),
            "trials": 1,
            "run": str(path / "run.yaml"),
            "subjects_dir": str(path / "subjects"),
            "tuning_dir": str(path / "tuning"),
            "protocols": (str(path / "places.yaml"), str(path / "edits.yaml")),
            "tuning_protocol": str(path / "tuning.yaml"),
            "work_dir": str(path / "work"),
            "output_dir": str(path / "results"),
        }
        | changes
    )


@pytest.mark.slow
def test_methods_are_compared_and_reported(world, capsys):
    config = compare_config(world, methods=("atoms/tiny", "full/default"), trials=2, max_drift=1.0)
    compare_methods.main(config)
    assert len(world.started) == 2 * (2 + 2)
    result = json.loads((world.path / "results" / "atoms-tiny.json").read_text())
    assert result["status"] == "done" and result["failed"] == [] and len(result["runs"]) == 2
    assert result["command"].startswith(
        "python -m benchmarks.compare_methods --methods atoms/tiny --seeds 0 --trials 2"
    )
    assert result["summary"].keys() == {"all", "in span", "hard"} and len(result["search"]) == 2
    figures = result["figures"]
    assert figures["learning_rate"] in (0.0014, 0.0042) and figures["within_allowance"]
    assert figures["parameters"] > 0 and figures["peak_memory_bytes"] > 1e7
    assert 2 * figures["parameters"] <= figures["tensor_bytes"] < figures["bytes"]
    best = max(result["search"].values(), key=lambda found: found["gain"])
    assert result["search"][f"{figures['learning_rate']:.3g}"] == best
    assert result["conditions"]["subjects"] == ["mug", "robot"] and result["machine"].endswith("runs at a time: 1")
    assert result["summary"]["all"]["prompt_match"]["count"] == 2

    compare_methods.main(config)
    options = {"run": config.run, "subjects_dir": config.subjects_dir, "protocols": config.protocols}
    shown = sheets.SheetsConfig(**options, results=config.output_dir, work_dir=config.work_dir)
    assert sheets.run_concepts(shown, "atoms/tiny", ("mug", "robot")).keys() == {"mug", "robot"}
    assert len(world.started) == 8

    page = world.path / "page.md"
    page.write_text(f"# Benchmarks\n\n{methods_report.START}\nold\n{methods_report.END}\n\nMore.\n")
    report = methods_report.ReportConfig(str(world.path / "results"), str(page), str(world.path / "images"))
    methods_report.main(report)
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == 2 * ["atoms/tiny", "full/default"] and "old" not in text
    assert "](images/methods_bytes.png)" in text
    widths = [len(columns) + 1 for columns in (methods_report.QUALITY, methods_report.COSTS)]
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [{row.count("|") for row in table} for table in tables] == [{width} for width in widths]
    assert "Not run: `atoms/default`" in text and text.endswith("\n\nMore.\n")
    for name in ("methods_bytes", "methods_tradeoffs"):
        assert Image.open(world.path / "images" / f"{name}.png").mode == "RGBA"

    compare_methods.main(dataclasses.replace(config, methods=("atoms/tiny",), trials=1))
    with pytest.raises(UserError, match="measured with other trials; expected files of one comparison"):
        methods_report.main(report)


def test_fewer_photos_are_trained_on_and_the_unseen_ones_stay(world):
    files = {path: path.read_bytes() for path in (world.path / "subjects").rglob("*.png")}
    (world.path / "subjects" / "mug" / "0.txt").write_text("a mug")
    (world.path / "subjects" / "mug" / "1.txt").write_text("a mug")
    folder = compare_methods.photos_folder(compare_config(world, photos=1))
    kept = {file.relative_to(folder) for file in (folder / "mug").rglob("*") if file.is_file()}
    unseen = {file.relative_to(world.path / "subjects") for file in files if file.parts[-3:-1] == ("mug", "unseen")}
    assert kept == {Path("mug/0.png"), Path("mug/0.txt"), *unseen} and unseen
    assert {path: path.read_bytes() for path in (world.path / "subjects").rglob("*.png")} == files
    for count in (0, 3):
        with pytest.raises(UserError, match=f"photos: found {count}; expected 1 to 2, the photos of"):
            compare_methods.photos_folder(compare_config(world, photos=count))


@pytest.mark.slow
def test_a_method_that_fails_stays_in_the_comparison(world, monkeypatch):
    broken = {"peft_type": "LORA", "target_modules": ["nowhere"]}
    monkeypatch.setattr(
        experiments, "read_adapter_fields", lambda m: broken if m.startswith("lora") else read_adapter_fields(m)
    )
    compare_methods.main(compare_config(world, methods=("token/default", "lora/attention_r16")))
    compare_methods.main(compare_config(world, methods=("lora/attention_r1",), trials=2))  # fails in the search
    methods = methods_report.read_methods(world.path / "results")
    searched = methods["lora/attention_r1"]
    assert searched["figures"] == {} and "conditions" not in searched
    assert [each["failed"][0]["subject"] for each in searched["search"].values()] == ["cat", "cat"]
    table = methods_report.make_table(methods)
    for method in ("lora/attention_r16", "lora/attention_r1"):
        assert methods[method]["status"] == "failed"
        assert f"`{method}` failed: " in table and "nowhere" in table and f"| `{method}`" not in table


def test_what_a_comparison_cannot_measure_is_said_before_it_begins(world):
    path = world.path
    places, edits = (str(path / f"{name}.yaml") for name in ("places", "edits"))

    def check(*protocols):
        check_protocols(protocols, (), path / "subjects")

    check(places, edits)
    with pytest.raises(UserError, match="^quick: expected subjects, prompts with a scene, and unrelated prompts"):
        compare_methods.main(compare_config(world, tuning_protocol="quick", trials=2))
    with pytest.raises(UserError, match=r"edits.yaml: expected subjects"):
        check(edits)
    with pytest.raises(UserError, match=r"places.yaml: expected prompts with a color or a pattern"):
        check(places, places)
    for file in sorted((path / "subjects" / "mug" / "unseen").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match="mug: found one photo to compare images with; expected two or more"):
        compare_methods.main(compare_config(world))
    assert not world.started


def test_every_method_of_diffusion_models_is_compared_the_most_telling_first():
    methods = ordered_methods()
    assert sorted(methods) == all_methods() and methods[: len(MOST_TELLING)] == [*MOST_TELLING]
    for method in methods:
        overrides = yaml.safe_load((EXPERIMENTS / method / "overrides.yaml").read_text())
        assert overrides.keys() <= {"learning_rate", "token_learning_rate"}  # all else is the same for all


def test_quick_is_few_methods_one_subject_of_each_kind_and_no_search():
    config = quick_config(CompareConfig(quick=True))
    assert config.methods == MOST_TELLING[:3] and config.subjects == ("mug", "mushroom")
    assert (config.seeds, config.trials) == ((0,), 1) and config.output_dir.startswith("out/")
    assert parse_config(CompareConfig, ["--quick", "true"]).quick


def figures(gain, drift, scenes=1.0):
    found = {"gain": gain, "drift": drift, "scenes": scenes, "scenes_base": 1.0}
    return {name: {"mean": value} for name, value in found.items()}


def test_the_best_rate_has_the_highest_gain_within_the_allowance():
    rates = {1.0: figures(0.3, 0.05), 2.0: figures(0.5, 0.09), 3.0: figures(0.9, 0.2), 4.0: figures(0.8, 0.05, 0.85)}
    assert choose_rate(rates, max_drift=0.1) == (2.0, True)
    assert choose_rate(rates, max_drift=0.3) == (3.0, True)
    assert choose_rate(rates, max_drift=0.01) == (1.0, False)
    assert choose_rate({1.0: None, 2.0: figures(0.1, 0.0)}, max_drift=0.1) == (2.0, True)
    assert choose_rate({1.0: None}, max_drift=0.1) == (None, False)


@pytest.mark.parametrize(
    ("drift", "tried"),
    [
        (lambda rate: rate / 10, [0.5, 1.5, 1.0]),  # a straight line, both axes logarithmic, is met at once
        (lambda rate: rate / 3, [0.5, 0.167, 0.3]),
        (lambda rate: rate / 1000, [0.5, 1.5, 4.5]),
        (lambda rate: rate, [0.5, 0.167, 0.0557]),
        (lambda rate: rate / 5.2, [0.5]),  # close enough
        (lambda rate: 0.02 if rate < 1 else None, [0.5, 1.5, 0.866]),  # it fails: halfway, by factors
        (lambda rate: 0.09 if rate == 0.5 else 0.1 + 1e-9, [0.5, 1.5]),  # the third would be the second again
    ],
)
def test_the_search_comes_close_to_the_allowance(drift, tried):
    def measure(rate):
        return None if drift(rate) is None else figures(rate, drift(rate))

    best, allowed, found = search_rate(0.5, 3, 0.1, measure)
    assert [*found] == tried
    within = [rate for rate in tried if drift(rate) is not None and drift(rate) <= 0.1]
    assert (best, allowed) == ((max(within), True) if within else (min(tried), False))


def test_the_search_stays_where_scenes_are_kept():
    best, allowed, found = search_rate(0.5, 3, 0.1, lambda rate: figures(rate, 0.05, 1.0 if rate < 1 else 0.5))
    assert [*found] == [0.5, 1.5, 0.866] and (best, allowed) == (0.866, True)


def test_standard_errors_are_over_subjects():
    found = summarize({"mug": [{"gain": 0.1}, {"gain": 0.3}], "cat": [{"gain": 0.5}, {"gain": 0.7}]})["gain"]
    means = np.array([0.2, 0.6])
    assert found["mean"] == 0.4 and found["median"] == 0.4 and found["count"] == 4
    assert found["standard_error"] == pytest.approx(means.std(ddof=1) / np.sqrt(2), abs=1e-4)


def result_of(subject, gain, kind="in span", seed=0, **more):
    """What a trial leaves, with these figures."""
    mean = {"mean": 0.5}
    metrics = {
        "similarity": {"base": mean, "concept": mean, "real": 0.9, "normalized_gain": {"mean": gain}},
        "drift": {"mean": gain / 10},
        "embedding_drift": mean,
        "scene_accuracy": {"base": mean, "concept": mean},
        "diversity": None,
        "prior_similarity": None,
    }
    trial = {"photos": f"samples/subjects/{subject}", "options": {"learning_rate": 0.1, "seed": seed}}
    done = {"status": "done", "trial": trial, "kind": kind, "top_1": 1.0, "metrics": {"toybox": metrics}}
    return done | {"parameters": 7, "bytes": 20} | more


def test_kinds_are_apart_and_subjects_with_a_failed_run_are_left_out():
    failed = {"status": "failed", "message": "no", "trial": {"photos": "samples/subjects/cat/", "options": {}}}
    results = [result_of("mug", 0.2), result_of("fish", 0.6, "hard"), result_of("cat", 0.9, seed=1), failed]
    found = summarize_kinds(results)
    assert {kind: each["gain"]["mean"] for kind, each in found.items()} == {"all": 0.4, "in span": 0.2, "hard": 0.6}
    assert "diversity" not in found["all"]


def test_methods_with_failed_runs_do_not_end_the_report():
    figures = {"train_seconds": 9.0, "peak_memory_bytes": 5, "device": "a GPU", "precision": "float32", "processes": 2}
    failed = {**result_of("cat", 0.5), "status": "failed", "message": "no memory"}
    results = [result_of("mug", 0.2, **figures), result_of("cat", 0.9, **figures), failed]
    done, none_done = describe_runs(results, {"tensor_bytes": 9}), describe_runs(results[1:], {})
    methods = {
        "atoms/tiny": done | {"conditions": {"trials": 1, "subjects": ["cat", "mug"], "seeds": [0]}},
        "full/default": none_done,
    }
    assert [found["status"] for found in methods.values()] == ["done", "failed"]
    table = methods_report.make_table(methods)
    assert "`atoms/tiny` failed in 1 runs (no memory); the subjects of these are left out." in table
    assert "`full/default` failed: no memory." in table
    assert [point.method for point in methods_report.points_of(methods)] == ["atoms/tiny"]
    assert "Subjects: cat, mug. Every method has its own learning rate, without a search." in table
    assert "Times and memory: a GPU, float32, runs at a time: 2." in table
    assert any(row.startswith("| `atoms/tiny`") and row.endswith("| 0 |") for row in table.splitlines())


def test_gains_are_compared_in_pairs_of_subject_and_seed():
    def runs(gains):
        return {"runs": [{"subject": subject, "seed": seed, "gain": gain} for (subject, seed), gain in gains.items()]}

    reference = runs({("mug", 0): 0.5, ("mug", 1): 0.7, ("cat", 0): 0.1})
    other = runs({("mug", 0): 0.4, ("mug", 1): 0.4, ("cat", 0): 0.4, ("fish", 0): 0.9})
    found = methods_report.gain_beside(other, reference)
    assert found["mean"] == pytest.approx((-0.2 + 0.3) / 2) and found["count"] == 2
    assert found["standard_error"] == pytest.approx(0.25, abs=1e-4)
    assert methods_report.gain_beside(runs({("mug", 3): 0.4}), reference) is None


def test_prompt_match_is_of_colors_and_patterns():
    result, shares = result_of("mug", 0.2), {"scene": 0.0, "color": 0.5, "pattern": 1.0}
    both = {f"{name}_accuracy": {"base": {"mean": 0.0}, "concept": {"mean": share}} for name, share in shares.items()}
    result["metrics"]["edits"] = both
    assert trial_figures(result)["prompt_match"] == 0.75


def test_files_of_other_conditions_do_not_mix(tmp_path):
    for number, method in enumerate(("atoms/tiny", "token/default")):
        conditions = {"subjects": ["mug"], "seeds": [number], "base": str(number)}
        content = {"method": method, "status": "done", "conditions": conditions}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="measured with other base; expected files of one comparison"):
        methods_report.read_methods(tmp_path)
    with pytest.raises(UserError, match="found no result file; run python -m benchmarks.compare_methods"):
        methods_report.read_methods(tmp_path / "none")
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(UserError, match="found no lines '<!-- methods"):
        methods_report.write_page(page, "table")


def point(method, size, similarity):
    values = {"similarity": (similarity, 0.01), "drift": (0.1, 0.01), "diversity": (0.2, 0.01)}
    return Point(method, size, values | {"prompt_match": (0.5, 0.0), "diversity_base": (0.4, 0.0)})


def test_the_frontier_has_what_no_smaller_method_reaches():
    points = [point("a", 100, 0.5), point("b", 50, 0.6), point("c", 200, 0.6), point("d", 200, 0.7), point("e", 9, 0.1)]
    assert [each.method for each in frontier(points)] == ["e", "b", "d"]


def test_the_plots_show_every_method_and_name_those_on_the_frontier():
    points = [point(f"lora/{n}", 100.0 * n, 0.5 - n / 100) for n in range(1, 30)] + [point("atoms/x", 1e5, 0.9)]
    axes = draw_frontier(points).axes[0]
    assert axes.get_xscale() == "log" and len(axes.containers) == 30
    names = [text.get_text() for text in axes.texts]
    assert "atoms/x" in names and "lora/1" in names and "lora/29" not in names
    assert [axes.get_xlabel() for axes in draw_tradeoffs(points).axes] == [
        "prompt match",
        "drift (less is better)",
        "diversity",
    ]


class Brightness:
    """A judge that sees how bright and how red an image is."""

    def embed(self, images):
        return torch.tensor([[*np.asarray(image.convert("RGB")).mean((0, 1))[:2], 10.0] for image in images])


def test_images_are_recognized_by_the_photos_that_they_are_most_like(tmp_path):
    for name, color in (("mug", "red"), ("cat", "lime")):
        (tmp_path / name / "unseen").mkdir(parents=True)
        for folder, shown in ((tmp_path / name, "white"), (tmp_path / name / "unseen", color)):
            Image.new("RGB", (32, 32), shown).save(folder / "0.png")
    gallery = Gallery.read(Brightness(), tmp_path)
    images = [Image.new("RGB", (32, 32), color) for color in ("maroon", "green", "red")]
    assert gallery.recognize(images) == ["mug", "cat", "mug"]
    assert gallery.top_1(images, ["mug", "mug", "mug"]) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_changes_are_screened_beside_their_predictions(world, monkeypatch, capsys):
    changes = {"none": Change("the same", 0.0, 0.0), "broken": Change("fails", 0.1, 0.1, adapter={"num_atoms": -1})}
    changes["one step"] = Change("half of it", -0.5, -0.01, {"max_train_steps": 1})
    monkeypatch.setitem(screening.TABLES, "adapter", ("atoms/conv", changes))
    path = world.path
    config = screening.ScreeningConfig(
        "adapter",
        trials=2,
        max_drift=1.0,
        run=str(path / "run.yaml"),
        tuning_dir=str(path / "tuning"),
        protocol=str(path / "tuning.yaml"),
        work_dir=str(path / "work"),
        output=str(path / "screening.json"),
    )
    screening.main(config)
    result = json.loads((path / "screening.json").read_text())
    found = result["changes"]
    assert [*found] == ["baseline", *changes] and result["baseline"] == "atoms/conv"
    assert result["command"].startswith("python -m benchmarks.screening --table adapter --trials 2")
    assert found["none"]["differences"]["gain"]["mean"] == 0 == found["none"]["differences"]["drift"]["mean"]
    assert "num_atoms=-1" in found["broken"]["failed"][0]["message"]
    assert found["one step"]["predicted"] == {"gain": -0.5, "drift": -0.01, "why": "half of it"}
    assert found["one step"]["differences"]["drift"]["mean"] < 0 and found["one step"]["options"] == {
        "max_train_steps": 1
    }
    table = capsys.readouterr().out
    assert "| one step | -0.500 | " in table and "| broken | failed: " in table
    started = len(world.started)
    screening.main(config)
    assert len(world.started) == started == 4 * 2
    written = set()
    monkeypatch.setattr(screening, "write_result", lambda file, *_, **__: written.add(file))
    screening.main(dataclasses.replace(config, output=None))
    assert written == {"benchmarks/results/screening_adapter.json"}
    with pytest.raises(UserError, match="changes: found 'more'; expected some of none, broken, one step"):
        screening.main(dataclasses.replace(config, changes=("more",)))


@pytest.mark.parametrize("table", screening.TABLES)
def test_every_change_can_be_trained(table, world):
    method, changes = screening.TABLES[table]
    from atomdiff.tuner.read_config import read_adapter

    for name, change in changes.items():
        folder = world.path / "changes" / name
        folder.mkdir(parents=True)
        fields = {**read_adapter_fields(method), **change.adapter}
        (folder / "adapter.json").write_text(json.dumps(fields))
        adapter = read_adapter(str(folder / "adapter.json"))
        photos = str(world.path / "subjects" / "mug")
        run = Trial(str(folder), photos, fields, {"learning_rate": 0.1, **change.options}, (), "configs/demo.yaml")
        config = run.config()
        for option, value in change.options.items():
            assert getattr(config, option) == value != getattr(dataclasses.replace(run, options={}).config(), option)
        assert all(getattr(adapter, field) == value for field, value in change.adapter.items())
        assert change.why and (change.options or change.adapter or change.rate != 1)
    assert len(changes) >= 10


def test_layers_are_added_to_those_of_the_baseline():
    method, changes = screening.TABLES["layers"]
    own = read_adapter_fields(method)["target_modules"]
    targets = {change.adapter["target_modules"].removeprefix(f"{own}|") for change in changes.values()}
    assert "all" in targets and not any("conv_out" in each for each in targets)


def test_differences_are_paired_by_subject():
    baseline = [result_of("mug", 0.1), result_of("cat", 0.7)]
    found = screening.differences([result_of("mug", 0.2), result_of("cat", 0.9)], baseline)
    assert found["gain"]["mean"] == found["gain"]["median"] == 0.15 and found["gain"]["standard_error"] == 0.05


@pytest.mark.slow
def test_the_sheets_show_what_the_judge_is_asked_about(world, monkeypatch):
    path = world.path
    config = sheets.SheetsConfig(
        method="atoms/tiny",
        subjects=("mug", "robot"),
        methods=("atoms/tiny", "token/default"),
        methods_subjects=("mug",),
        run=str(path / "run.yaml"),
        num_inference_steps=2,
        protocols=(str(path / "places.yaml"), str(path / "edits.yaml")),
        subjects_dir=str(path / "subjects"),
        results=str(path / "results"),
        work_dir=str(path / "work"),
        images=str(path / "images"),
        output=str(path / "sheets.json"),
    )
    (path / "results").mkdir()
    (path / "results" / "atoms-tiny.json").write_text('{"figures": {"learning_rate": 0.003}}')
    steps = set()

    def generate(suite, *args):
        steps.add(suite.num_inference_steps)
        return generate_images(suite, *args)

    monkeypatch.setattr(sheets, "generate_images", generate)
    sheets.main(config)
    assert steps == {2}
    assert [*(path / "work" / "atoms" / "tiny").iterdir()] == [path / "work" / "atoms" / "tiny" / "0.003"]
    result = json.loads((path / "sheets.json").read_text())
    assert {name: len(seen) for name, seen in result["seen_as"].items()} == {"mug": 3, "robot": 3}
    names = [name for subject in result["seen_as"].values() for name in subject[:2]]
    share = sum(name == shown for name, shown in zip(names, ("mug", "mug", "robot", "robot"), strict=True)) / 4
    assert result["figures"]["top_1"] == share and "token/default:top_1_recolored" in result["figures"]
    first, second = (Image.open(path / "images" / f"{name}.png") for name in ("subjects", "methods"))
    assert first.height > 5 * 32 and second.height > 4 * 32

    concepts = [*(path / "work" / "atoms").rglob("*-seed0/run/*.atoms.safetensors")]
    results = {file: file.read_text() for file in (concept.parents[1] / "result.json" for concept in concepts)}
    for concept in concepts:
        concept.unlink()  # as where results alone were kept

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(trials, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    assert results == {file: file.read_text() for file in results}
    started = len(world.started)
    sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    assert len(world.started) == started + 2 == started + len(concepts) and all(map(Path.is_file, concepts))


@pytest.mark.slow
def test_each_setting_is_sampled_with_the_same_concepts(world, monkeypatch, capsys):
    path = world.path
    seen = []

    def generate(suite, pipe, *others):
        seen.append((type(pipe.scheduler).__name__, suite.num_inference_steps, suite.guidance_scale))
        return generate_images(suite, pipe, *others)

    monkeypatch.setattr(sampling, "generate_images", generate)
    sampling.main(
        sampling.SamplingConfig(
            methods=("atoms/tiny",),
            schedulers=("euler",),
            steps=(2,),
            guidance_scales=(1.5,),
            images_per_prompt=1,
            run=str(path / "run.yaml"),
            tuning_dir=str(path / "tuning"),
            protocol=str(path / "tuning.yaml"),
            work_dir=str(path / "work"),
            output=str(path / "sampling.json"),
        )
    )
    assert seen == [
        ("DDIMScheduler", 1, 7.5),
        ("EulerDiscreteScheduler", 1, 7.5),
        ("DDIMScheduler", 2, 7.5),
        ("DDIMScheduler", 1, 1.5),
    ]
    figures = json.loads((path / "sampling.json").read_text())["figures"]["atoms/tiny"]
    assert [*figures] == ["as it is", "euler", "2 steps", "guidance 1.5"]
    assert len({found["mean"] for found in figures.values()}) == 4
    assert len(world.started) == 1 and "| guidance 1.5 | " in capsys.readouterr().out
