"""The benchmarks in miniature: they run, and their result files say how to repeat them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from atomdiff.utils.errors import UserError
from benchmarks import (
    classify_methods,
    keep,
    library,
    patching,
    screening,
    subjects_per_batch,
    survival,
    training_step,
    training_step_toybox,
    warm_start,
)
from benchmarks.classifier_runs import Comparison
from benchmarks.classifier_worlds import WORLDS, DigitImages
from benchmarks.experiments import EXPERIMENTS, rates_around
from benchmarks.methods_plots import draw_keep
from benchmarks.result_file import command_line
from benchmarks.timing import take_turns

CONCEPT = Path(__file__).parents[1] / "fixtures" / "robot.atoms.safetensors"


@pytest.fixture
def result(tmp_path):
    """Reads a result file."""

    def read(name):
        result = json.loads((tmp_path / name).read_text())
        assert result["command"].startswith("python -m benchmarks.") and re.match(r"\d{4}-", result["date"])
        assert result["versions"]["torch"] and result["machine"]
        return result["figures"]

    return read


@pytest.mark.slow
def test_a_training_step(result, tmp_path):
    methods = ("spatial", "lora_attn")
    training_step.main(
        training_step.BenchmarkConfig(("tiny_cpu",), methods, (False,), repeats=1, output_dir=str(tmp_path))
    )
    figures = result("training_step_tiny_cpu.json")
    assert figures["step_over_lora_attn_tiny_cpu"] > 0
    assert figures["trained_numbers_spatial_tiny_cpu"] < figures["trained_numbers_lora_attn_tiny_cpu"]


@pytest.mark.slow
def test_a_training_step_of_every_method(result, tmp_path):
    run = tmp_path / "run.yaml"
    tiny = CONCEPT.parent / "tiny-sd"
    run.write_text(f"pretrained_model_name_or_path: {tiny}\ntrain_token: true\ntrain_batch_size: 1\n")
    config = training_step_toybox.BenchmarkConfig(
        ("token/default", "atoms/default"), 2, str(run), output=str(tmp_path / "steps.json")
    )
    training_step_toybox.main(config)
    figures = result("steps.json")
    names = {"lora/attention_r16", "atoms/default", "token/default", "again"}
    assert {name.partition(":")[0] for name in figures} == names
    assert figures["lora/attention_r16:over_lora"] == figures["atoms/default:over_atoms"] == 1
    seconds = [figures[f"{name}:step_seconds"] for name in ("token/default", "atoms/default")]
    assert figures["token/default:over_atoms"] == pytest.approx(seconds[0] / seconds[1], rel=1e-2)
    memory = {name: figures[f"{name}:memory_bytes"] for name in names}
    assert 0 < memory["token/default"] < memory["lora/attention_r16"] == pytest.approx(memory["again"], rel=0.05)


def test_steps_go_on_in_a_run(monkeypatch):
    calls = []
    monkeypatch.setattr(training_step_toybox, "step_alone", lambda started, step: calls.append((started, step)))
    one, other = (training_step_toybox.stepper(SimpleNamespace(done=done)) for done in (0, 4))
    for step in (one, other, one):
        step()
    assert [step for _, step in calls] == [1, 5, 2]


def test_a_library(tmp_path):
    for number in range(8):
        shutil.copy(CONCEPT, tmp_path / f"robot-{number}.atoms.safetensors")
    figures = library.measure(str(tmp_path), library.BenchmarkConfig(opened=4, hits=10, repeats=1))
    assert (figures["concepts"], figures["concepts_kept"]) == (8, 4)


def test_similar_concepts_of_a_library(tmp_path):
    for number in range(3):
        shutil.copy(CONCEPT, tmp_path / f"robot-{number}.atoms.safetensors")
    figures = library.measure_similar(str(tmp_path), library.BenchmarkConfig(opened=2))
    assert (figures["concepts"], figures["duplicates_found"]) == (3, 1) and figures["similar_ms"] > 0


@pytest.mark.slow
def test_concepts_kept_in_part(result, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"pretrained_model_name_or_path: {CONCEPT.parent / 'tiny-sd'}\nnum_inference_steps: 1\n")
    edits = tmp_path / "edits.yaml"
    edits.write_text('images_per_prompt: 1\nprompts: [{prompt: "a red {subject}", color: red}]\n')
    small = {"config": str(run), "protocols": ("quick", str(edits)), "num_prompts": 1}
    files = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "keep.json")}
    keep.main(keep.BenchmarkConfig((str(CONCEPT),), (0.0, 0.3, 1.0), **small, **files))
    figures = result("keep.json")
    assert figures["0:file_bytes"] < figures["0.3:file_bytes"] < figures["1:file_bytes"] == CONCEPT.stat().st_size
    assert {"similarity", "drift", "prompt_match"} <= {name.partition(":")[2] for name in figures}
    assert figures["0:drift"] == 0 < figures["1:drift"]  # prompts of others do not have the trigger word, which stays
    settings = json.loads((tmp_path / "work" / "0.3" / "quick" / "results.json").read_text())["settings"]
    assert settings["num_inference_steps"] == "1"
    assert len({path.resolve() for path in (tmp_path / "work").glob("*/*/images/base")}) == 1
    summary = json.loads((tmp_path / "keep.json").read_text())["summary"]
    axes = draw_keep(summary).axes
    assert [each.get_ylabel() for each in axes] == ["similarity", "prompt match", "drift (less is better)"]
    assert [*axes[2].lines[0].get_xdata()] == [0, 0.3, 1]
    assert [*axes[2].lines[0].get_ydata()] == [figures[f"{share}:drift"] for share in ("0", "0.3", "1")]


@pytest.mark.slow
def test_subjects_in_one_batch(result, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"pretrained_model_name_or_path: {CONCEPT.parent / 'tiny-sd'}\n")
    few = {"repeats": 1, "steps": 2, "run_steps": 4}
    subjects_per_batch.main(
        subjects_per_batch.BenchmarkConfig((2,), (1,), config=str(run), output=str(tmp_path / "batch.json"), **few)
    )
    figures = result("batch.json")
    assert figures["over_alone_2_1"] > 0 and figures["memory_2_1"] > figures["memory_alone_1"] > 0
    assert 0 < figures["difference_1"] < 1e-2


@pytest.mark.slow
def test_warm_starts(result, tmp_path):
    run = tmp_path / "run.yaml"
    tiny = CONCEPT.parent / "tiny-sd"
    run.write_text(f"pretrained_model_name_or_path: {tiny}\ntrain_batch_size: 1\nreport_to: none\n")
    few = {"max_train_steps": 4, "validation_loss_steps": 1, "init_probe_steps": 2}
    files = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "warm_start.json")}
    config = warm_start.BenchmarkConfig(("mug", "robot"), (1,), (0.5,), config=str(run), **few, **files)
    warm_start.main(config)
    figures = result("warm_start.json")
    assert (
        figures["cold:steps_0.5"] >= 0 and figures["1:first_loss_over_cold"] > 0 and -1 <= figures["1:similarity"] <= 1
    )
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.atoms.safetensors")}
    warm_start.main(config)  # finished runs are not repeated
    assert len(before) == 6 and all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert result("warm_start.json") == figures
    assert warm_start.arrival({0: 2.0, 10: 1.0, 20: 1.5}, 1.2, probe_steps=5) == 15


@pytest.mark.slow
def test_what_a_run_survives(result, tmp_path, monkeypatch):
    for name in ("SOURCE_DATE_EPOCH", "HF_TOKEN", "HF_ENDPOINT", "TMPDIR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # to be as before afterwards
    survival.main(survival.BenchmarkConfig(1, "^(checkpoint torn|photo replaced)$", output=str(tmp_path / "s.json")))
    figures = result("s.json")
    assert (figures["kills"], figures["kills_survived"], figures["faults"], figures["faults_survived"]) == (1, 1, 2, 2)
    assert (figures["faults_recovered"], figures["faults_errors"]) == (1, 1)


@pytest.fixture
def short(monkeypatch):
    """Makes a world small and its base's training short."""

    def shorten(name):
        world = dataclasses.replace(WORLDS[name](), base_steps=2)
        if name == "toybox":
            world = dataclasses.replace(world, base_per_class=4)
        monkeypatch.setitem(WORLDS, name, lambda: world)

    return shorten


@pytest.mark.slow
def test_patching(result, short, tmp_path):
    short("digits")
    folders = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "patching.json")}
    few = {"seeds": (0,), "trials": 1, "max_train_steps": 2, "alphas": (0.0, 1.0)}
    few["methods"] = ("full", "linear", "conv", "lora_conv_r4", "mona", "conv_adapter")
    patching.main(patching.BenchmarkConfig("digits", **few, **folders))
    figures = result("patching.json")
    for name in ("linear", "atoms", "lora_conv_r4", "mona", "conv_adapter"):
        assert figures[f"{name}:equal_to_the_bit"] is True and 0 < figures[f"{name}:switch_seconds"] < 1
        assert 0 < figures[f"{name}:bytes_share"] < 0.1 and 0 < figures[f"{name}:load_seconds"] < 10
        assert figures[f"{name}:accuracy"] > 0 and figures[f"unseen:{name}:ink"] > 0
    refused = json.loads((tmp_path / "patching.json").read_text())["not_in_one_model"]
    assert refused.keys() == {"full"} and "weights of its own and shares none with a base" in refused["full"]
    assert "full:equal_to_the_bit" not in figures and figures["full:bytes_share"] == 1
    assert figures["interpolation:0.0:base"] == figures["base:accuracy"] == figures["atoms:base_accuracy"]
    assert figures["interpolation:1.0:new"] == figures["full:accuracy"] > 0
    assert figures["interpolation:atoms:new"] == figures["atoms:accuracy"]
    assert figures["atoms:bytes"] < figures["full:bytes"] and figures["unseen:base:ink"] > 0
    written = (tmp_path / "patching.json").stat().st_mtime_ns
    patching.main(patching.BenchmarkConfig("digits", **few, **folders))  # finished runs are read again
    assert (tmp_path / "patching.json").stat().st_mtime_ns > written


def test_patches_are_compared_with_copies_and_atoms(tmp_path):
    methods = patching.BenchmarkConfig().methods
    assert all((EXPERIMENTS / "classify" / method / "adapter.json").is_file() for method in {*methods} - {"linear"})
    for others in (("full", "mona"), ("conv", "mona")):
        with pytest.raises(UserError, match=f"^methods: found {', '.join(others)}; expected full and conv among them"):
            patching.main(patching.BenchmarkConfig(methods=others, work_dir=str(tmp_path)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("world", ["toybox", "digits"])
def test_methods_of_classifiers(world, result, short, tmp_path):
    short(world)
    methods, output = ("full", "conv"), tmp_path / "methods.json"
    few = {"seeds": (0,), "trials": 1, "max_train_steps": 2, "repeats": 1, "large": False}
    folders = {"work_dir": str(tmp_path / "work"), "output": str(output)}
    classify_methods.main(classify_methods.BenchmarkConfig(world, methods, **few, **folders))
    figures = result("methods.json")
    command = json.loads(output.read_text())["command"]
    assert ("--world digits" in command) == (world == "digits")
    images = {path.name for path in (tmp_path / "work" / world / "images").iterdir()}
    assert images == {"base", "patterns" if world == "toybox" else "five to nine"}
    assert figures["full:parameters_share"] == 1 and 0 < figures["conv:parameters_share"] < 0.1
    assert all(figures[f"{method}:step_seconds"] > 0 for method in methods)
    assert figures["full:steps_to_95"] == 2 and figures["full:seconds_to_95"] > 0


@pytest.mark.slow
def test_time_and_memory_at_real_size(short, tmp_path):
    short("toybox")
    comparison = Comparison("toybox", classify_methods.SIZES["toybox"], tmp_path)
    figures = classify_methods.measure_large(comparison, "patterns", {"linear": 0.01}, repeats=1)
    assert 0 < figures["linear:large_step_seconds"] < 60 and 1e7 < figures["linear:large_memory"] < 1e10


def test_a_search_goes_on_while_the_best_rate_is_at_the_end(tmp_path, monkeypatch):
    comparison = Comparison("toybox", classify_methods.SIZES["toybox"], tmp_path)
    monkeypatch.setattr(comparison, "run", lambda _, __, rate, seed: {"accuracy": {"validation": -abs(rate - 0.8)}})
    found = {further: comparison.best_rate(["patterns"], "conv", 3, further=further) for further in (False, True)}
    assert found == {False: pytest.approx(0.27), True: pytest.approx(0.81)}


def test_cost_is_that_of_the_mean_curve():
    def runs(*curves):
        return [
            {"validations": [{"step": 5 * i, "accuracy": value} for i, value in enumerate(curve)]} for curve in curves
        ]

    reports = {"full": runs((0.2, 0.9, 1), (0.4, 0.96, 1)), "atoms": runs((0.1, 0.5, 0.92), (0.1, 0.5, 0.92))}
    found = classify_methods.cost_figures(reports, {"full": 2.0, "atoms": 0.1})
    assert found["best_validation_accuracy"] == 100
    assert [found[f"full:{what}_to_{percent}"] for what in ("steps", "seconds") for percent in (90, 95)] == [
        5,
        10,
        10,
        20,
    ]
    assert [found[f"atoms:{what}_to_{percent}"] for what in ("steps", "seconds") for percent in (90, 95)] == [
        10,
        None,
        1,
        None,
    ]


def test_no_handwritten_digit_is_in_both_halves():
    halves = [DigitImages(half) for half in (0, 1)]
    shown = [{half(name, None).tobytes() for name in "0123456789" for _ in range(87)} for half in halves]
    assert len(shown[0]) > 850 and not shown[0] & shown[1]


def test_styles_of_digits_show_the_same_ones(tmp_path):
    world = WORLDS["digits"]()
    folders = [
        task.write(tmp_path / name, 4, seed=1) for name, task in [*world.unseen.items(), ("ink", world.tasks["ink"])]
    ]
    images = [
        [np.asarray(Image.open(folder / "3" / f"000{n}.png").convert("L")) for n in range(4)] for folder in folders
    ]
    for number in range(4):
        pencil, chalk, ink = (abs(of_style[number] - np.median(of_style[number])) > 60 for of_style in images)
        for other in (pencil, chalk):
            overlaps = [(other & (abs(each - np.median(each)) > 60)).sum() for each in images[2]]
            assert overlaps[number] == max(overlaps)


def test_the_command_names_what_is_not_the_default():
    config = library.BenchmarkConfig(concepts=8, output="elsewhere.json")
    assert command_line("library", config) == "python -m benchmarks.library --concepts 8"
    config = training_step.BenchmarkConfig(parts=("sd15_cpu", "sd15_gpu"))
    assert command_line("training_step", config) == "python -m benchmarks.training_step --parts sd15_cpu sd15_gpu"
    config = screening.ScreeningConfig(changes=("600 steps", "EMA"))
    assert command_line("screening", config) == "python -m benchmarks.screening --changes '600 steps' EMA"


def test_turns_and_rates():
    calls = []
    found = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warm_up=1)
    assert found.keys() == {"a", "b"} and sorted(calls) == ["a"] * 3 + ["b"] * 3
    assert [rates_around(6.0, trials, 3) for trials in (1, 2, 3)] == [[6.0], [2.0, 6.0], [2.0, 6.0, 18.0]]
