"""Ways to tune one classifier: what each trains, stores and costs, and how far it comes.

    python -m benchmarks.classify_methods
    python -m benchmarks.classify_methods --world digits --large false

A small ResNet that knows the classes of drawn things learns which of eight patterns one has in an ink drawing, from 16
images a pattern (`benchmarks/classifier_worlds.py`). With the world digits, of real images, it knows the handwritten
digits 0 to 4 and learns 5 to 9 from 16 images a digit, of those images that it has not seen. Every method gets the best
of three learning rates by validation accuracy on a seed of its own, and of further ones while the best is the lowest or
highest; accuracies are those of five other seeds. Cost is the steps until the validation accuracy, a mean over the
seeds, first reaches 90 or 95 % of full tuning's best one, and these steps' time. Time and memory of a step are also
measured at the size of ResNet-18, with random weights, 16 images of 128 pixels. Times of steps are measured in turns,
so that what else the machine does meets all alike; memory is the peak of a process of its own, above what it held
before it opened the base.

Expected before the first run: atoms come within 5 points of full tuning, with 2 % of its parameters or less, and above
the probe by more than 20; LoRA lies between; norms, the counterpart of BitFit in a network whose convolutions have no
biases, below LoRA. No method saves 90 % of the time to 95 % of full tuning's accuracy: a step costs all of them at
least half of full tuning's, and none needs fewer steps. Parameters and bytes are 95 % less.

Expected before the first run on digits: the strokes are those that the base knows, so that little has to change. Atoms,
LoRA and Conv-Adapter come within 2 points of full tuning or above it, Mona within 5; norms are between those and the
probe, which is 10 points or more below full tuning. Atoms reach 95 % of full tuning's accuracy in 150 steps, in more
seconds than full tuning does.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from atomdiff.utils.atomic import write_json
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.classifier_runs import Comparison, Sizes, folder_bytes, train
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import take_turns

TASKS = {"toybox": "patterns", "digits": "five to nine"}
SIZES = {
    world: Sizes(train=16, validation=16, test=test, steps=150, validation_steps=10)
    for world, test in (("toybox", 64), ("digits", None))
}
RESNET_18 = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
TARGETS = (90, 95)  # % of full tuning's accuracy
SHARES = ("parameters", "bytes", "step_seconds", "seconds_to_90", "seconds_to_95", "large_step_seconds", "large_memory")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to compare."""

    world: Literal["toybox", "digits"] = "toybox"
    """The images: drawn things, or handwritten digits (needs scikit-learn)."""
    methods: tuple[str, ...] = ("full", "linear", "conv", "spatial", "lora_conv_r4", "norms", "mona", "conv_adapter")
    """Folders under configs/experiments/classify, or "linear" for the head alone; the first is compared with."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs: images trained on, the head's first weights, batches."""
    trials: int = 3
    """Learning rates a method, 1 to 3."""
    max_train_steps: int = 150
    """Steps of every run."""
    repeats: int = 10
    """Training steps that are timed."""
    large: bool = True
    """Measure time and memory at the size of ResNet-18, too."""
    work_dir: str = "out/classify_methods"
    """Folder of the images and the runs; finished runs are not repeated."""
    output: str | None = None
    """The result file. Default: benchmarks/results/classify_methods.json, or classify_methods_digits.json."""


def large_fields(comparison: Comparison, task: str, method: str, rate: float) -> dict[str, Any]:
    """Return the options of a few steps at the size of ResNet-18."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    base = comparison.work / "resnet-18"
    if not base.is_dir():
        torch.manual_seed(0)
        ResNetForImageClassification(ResNetConfig(**RESNET_18)).save_pretrained(base)
    return comparison.fields(task, method, rate, 0) | {
        "pretrained_model_name_or_path": str(base),
        "train_data_dir": str(comparison.world.tasks[task].write(comparison.work / "images" / "few", 4, seed=50)),
        "validation_share": 0.25,
        "test_share": 0.25,
        "resolution": 128,
        "train_batch_size": 16,
        "eval_batch_size": 16,
        "max_train_steps": 3,
    }


def step_seconds(fields_of: dict[str, dict[str, Any]], folder: Path, repeats: int) -> dict[str, float]:
    """Return the median time of a training step by method, in turns, in seconds."""
    import torch

    from atomdiff.classify.config import ClassifyConfig
    from atomdiff.classify.method import read_method
    from atomdiff.classify.run import build_run
    from atomdiff.classify.train import train_step
    from atomdiff.training.launch import new_accelerator

    def step_of(fields: dict[str, Any]) -> Callable[[], float]:
        config = ClassifyConfig(**fields, output_dir=str(folder))
        run = build_run(config, read_method(config), new_accelerator(config.mixed_precision))
        size = run.processor.size["shortest_edge"]
        pixels = torch.randn(config.train_batch_size, 3, size, size)
        labels = torch.arange(config.train_batch_size) % len(run.splits.classes)
        return lambda: train_step(run, 1, pixels, labels)

    return take_turns({method: step_of(fields) for method, fields in fields_of.items()}, repeats, warm_up=2)


def train_and_measure(folder: Path, fields: dict[str, Any]) -> int:
    """Train in this process; return by how many bytes its peak memory exceeds what it held before."""
    import psutil

    import atomdiff.classify.train  # noqa: F401 (its own memory is not the method's)

    quiet_libraries()
    before = psutil.Process().memory_info().rss
    train(folder, **fields)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def peak_memory(fields: dict[str, Any], folder: Path) -> int:
    """Return the bytes that a few steps take, in a process of its own; measured once."""
    if not (folder / "bytes.json").is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            write_json(folder / "bytes.json", processes.submit(train_and_measure, folder, fields).result())
    found: int = json.loads((folder / "bytes.json").read_text())
    return found


def mean_curve(reports: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Return the mean validation accuracy of some runs by step."""
    steps = [each["step"] for each in reports[0]["validations"]]
    return {step: statistics.mean(r["validations"][i]["accuracy"] for r in reports) for i, step in enumerate(steps)}


def cost_figures(reports: Mapping[str, Sequence[dict[str, Any]]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return steps and seconds of each method until it is nearly as good as the first one gets; None: it never is."""
    curves = {method: mean_curve(of_method) for method, of_method in reports.items()}
    best = max(next(iter(curves.values())).values())
    figures: dict[str, Any] = {"best_validation_accuracy": round(100 * best, 2)}
    for method, curve in curves.items():
        for percent in TARGETS:
            reached = (step for step, accuracy in curve.items() if accuracy >= percent / 100 * best)
            steps = next(reached, None)
            figures[f"{method}:steps_to_{percent}"] = steps
            figures[f"{method}:seconds_to_{percent}"] = None if steps is None else round(steps * seconds[method], 2)
    return figures


def figures_of(reports: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the figures of a method's runs, given the seconds of a step."""
    test = [100 * report["accuracy"]["test"] for report in reports]
    return {
        "test_accuracy": round(statistics.mean(test), 2),
        "test_accuracy_min": round(min(test), 2),
        "test_accuracy_max": round(max(test), 2),
        "test_accuracy_deviation": round(statistics.stdev(test), 2) if len(test) > 1 else 0.0,
        "parameters": reports[0]["num_trainable_parameters"]["adapter"],
        "statistics": reports[0]["num_trainable_parameters"]["statistics"],
        "train_seconds": round(statistics.median(report["train_seconds"] for report in reports), 1),
        "step_seconds": round(seconds, 5),
    }


def measure_large(comparison: Comparison, task: str, rates: dict[str, float], repeats: int) -> dict[str, Any]:
    """Return time and memory of a training step at the size of ResNet-18, by method."""
    large = {method: large_fields(comparison, task, method, rate) for method, rate in rates.items()}
    memory = {method: peak_memory(fields, comparison.work / "memory" / method) for method, fields in large.items()}
    seconds = step_seconds(large, comparison.work / "timing", repeats)
    return {f"{method}:large_memory": found for method, found in memory.items()} | {
        f"{method}:large_step_seconds": round(found, 4) for method, found in seconds.items()
    }


def main(config: BenchmarkConfig) -> None:
    """Run what is not done yet, and write the result file."""
    quiet_libraries()
    task, sizes = TASKS[config.world], replace(SIZES[config.world], steps=config.max_train_steps)
    comparison = Comparison(config.world, sizes, Path(config.work_dir))
    base = comparison.base()
    rates = {
        method: comparison.best_rate([task], method, config.trials, further=config.trials > 1)
        for method in config.methods
    }
    reports = {
        method: [comparison.run(task, method, rate, seed) for seed in config.seeds] for method, rate in rates.items()
    }
    small = {method: comparison.fields(task, method, rate, 0) for method, rate in rates.items()}
    seconds = step_seconds(small, comparison.work / "timing", config.repeats)
    reference = config.methods[0]
    figures: dict[str, Any] = {
        "base_accuracy": round(100 * base["accuracy"]["test"], 2),
        "base_parameters": base["num_base_parameters"],
        **cost_figures(reports, seconds),
    }
    for method, rate in rates.items():
        found = figures_of(reports[method], seconds[method])
        folder = comparison.folder(task, method, rate, config.seeds[0]) / "classifier"
        found |= {"learning_rate": float(f"{rate:.3g}"), "bytes": folder_bytes(folder)}
        figures |= {f"{method}:{name}": value for name, value in found.items()}
    if config.large:
        figures |= measure_large(comparison, task, rates, config.repeats)
    for method in config.methods:
        for name in SHARES:
            own, full = figures.get(f"{method}:{name}"), figures.get(f"{reference}:{name}")
            figures[f"{method}:{name}_share"] = round(own / full, 4) if own is not None and full else None
    runs = {method: [report["validations"] for report in of_method] for method, of_method in reports.items()}
    name = "classify_methods" if config.world == "toybox" else f"classify_methods_{config.world}"
    output = config.output or f"benchmarks/results/{name}.json"
    write_result(output, command_line("classify_methods", config, ("work_dir", "output")), figures, runs=runs)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
