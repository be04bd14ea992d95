"""The benchmarks in miniature: they run, and their result files say how to repeat them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import discriminative, keep, library, training_step
from benchmarks.experiments import rates_around
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


def test_a_library(tmp_path):
    for number in range(8):
        shutil.copy(CONCEPT, tmp_path / f"robot-{number}.atoms.safetensors")
    figures = library.measure(str(tmp_path), library.BenchmarkConfig(opened=4, hits=10, repeats=1))
    assert (figures["concepts"], figures["concepts_kept"]) == (8, 4)


@pytest.mark.slow
def test_concepts_kept_in_part(result, tmp_path):
    small = {"base": str(CONCEPT.parent / "tiny-sd"), "num_prompts": 1, "num_inference_steps": 1}
    files = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "keep.json")}
    keep.main(keep.BenchmarkConfig((str(CONCEPT),), (0.0, 0.3, 1.0), **small, **files))
    figures = result("keep.json")
    assert figures["0:file_bytes"] < figures["0.3:file_bytes"] < figures["1:file_bytes"] == CONCEPT.stat().st_size
    assert {"similarity", "drift"} <= {name.partition(":")[2] for name in figures}


@pytest.mark.slow
def test_discriminative_tuning(result, tmp_path):
    few = {"source_per_class": 3, "train_per_class": 1, "validation_per_class": 1, "test_per_class": 1}
    steps = {"source_steps": 1, "max_train_steps": 1}
    folders = {"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "discriminative.json")}
    discriminative.main(
        discriminative.BenchmarkConfig(("linear", "conv"), seeds=(0,), trials=1, **few, **steps, **folders)
    )
    assert result("discriminative.json")["conv:trained_numbers"] > 0


def test_the_command_names_what_is_not_the_default():
    config = library.BenchmarkConfig(concepts=8, output="elsewhere.json")
    assert command_line("library", config) == "python -m benchmarks.library --concepts 8"
    config = training_step.BenchmarkConfig(parts=("sd15_cpu", "sd15_gpu"))
    assert command_line("training_step", config) == "python -m benchmarks.training_step --parts sd15_cpu sd15_gpu"


def test_turns_and_rates():
    calls = []
    found = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warm_up=1)
    assert found.keys() == {"a", "b"} and sorted(calls) == ["a"] * 3 + ["b"] * 3
    assert [rates_around(6.0, trials, 3) for trials in (1, 2, 3)] == [[6.0], [2.0, 6.0], [2.0, 6.0, 18.0]]
