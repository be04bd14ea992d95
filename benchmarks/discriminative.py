"""Discriminative tuning side by side: a small ResNet moves from one drawing style and task to another.

    python -m benchmarks.discriminative

The base learns to name the class of things as the toybox draws them (16 classes, many images). The target is another
style and another task with few images a class: which of eight patterns, that the base has never seen, a thing has
in an ink drawing (`atomdiff/toybox/styles.py`). Every method goes through the same training run, on all seeds at its
own rate times 1/3, 1 and 3; the best rate has the highest mean validation accuracy over the seeds (on one seed, or on
8 images a pattern, the choice was a matter of luck). For the linear probe that is the head's rate, which all others
leave at its default. A seed changes the images trained on, the head's first weights and the batches; the images
that it does not draw are the test. Images are mirrored and cropped at random for all. The statistics of batch norms
follow the images in all methods but the probe (`--batch_norm frozen` compares without that); "linear_updated" is a
probe whose statistics follow them, too. "share" is the adapter's numbers and those statistics over the base's
parameters and statistics; the head, the same for all, is in neither.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.classifier_runs import train
from benchmarks.experiments import EXPERIMENTS, own_rate, rates_around
from benchmarks.result_file import command_line, write_result

PROBES = {"linear": "frozen", "linear_updated": "updated"}
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic"}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to compare."""

    methods: tuple[str, ...] = (*PROBES, "full", "spatial", "conv", "conv_wide", "lora_conv_r1", "lora_conv_r4")
    """Folders under configs/experiments/classify, or for the head alone "linear" and "linear_updated"."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs."""
    trials: int = 3
    """Learning rates a method, 1 to 3."""
    probe_learning_rate: float = 9e-3
    """The head's learning rate from which the linear probe's trials start."""
    source_per_class: int = 500
    """Images of each class that the base learns from, those held out included."""
    source_steps: int = 1000
    """Steps of the base."""
    train_per_class: int = 16
    """Images of each pattern to train on."""
    validation_per_class: int = 24
    """Images of each pattern to choose the step and the learning rate by."""
    test_per_class: int = 128
    """Images of each pattern to test on."""
    max_train_steps: int = 300
    """Steps of every method, of 32 images."""
    batch_norm: Literal["updated", "frozen"] = "updated"
    """Statistics of batch norms, for all methods but the linear probe, which leaves them as they are."""
    work_dir: str = "out/discriminative"
    """Folder of the images and the runs; finished runs are not repeated."""
    output: str = "benchmarks/results/discriminative.json"
    """The result file."""


def prepare_base(config: BenchmarkConfig, work: Path) -> dict[str, Any]:
    """Draw both image folders and train the base on the first; give the base's report."""
    from transformers import ResNetConfig

    from atomdiff.toybox.folders import write_classes, write_patterns

    of_each = config.train_per_class + config.validation_per_class + config.test_per_class
    write_classes(work / "source", per_class=config.source_per_class, seed=1)
    write_patterns(work / "target", per_class=of_each, seed=2)
    ResNetConfig(**RESNET).save_pretrained(work / "architecture")
    return train(
        work / "base",
        random_flip=True,
        pretrained_model_name_or_path=str(work / "architecture"),
        train_data_dir=str(work / "source"),
        from_scratch=True,
        adapter="full",
        learning_rate=2e-3,
        head_learning_rate=2e-3,
        lr_warmup_steps=min(100, config.source_steps),
        max_train_steps=config.source_steps,
        validation_steps=250,
        resolution=64,
    )


def run(config: BenchmarkConfig, work: Path, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Tune the base to the target by one method."""
    of_each = config.train_per_class + config.validation_per_class + config.test_per_class
    fields = {"adapter": str(EXPERIMENTS / "classify" / method / "adapter.json"), "learning_rate": rate}
    fields["batch_norm"] = config.batch_norm
    if method in PROBES:
        fields = {"adapter": "linear", "head_learning_rate": rate, "batch_norm": PROBES[method]}
    report = train(
        work / config.batch_norm / method / f"{rate:.3g}" / f"seed-{seed}",
        pretrained_model_name_or_path=str(work / "base" / "classifier"),
        train_data_dir=str(work / "target"),
        validation_share=config.validation_per_class / of_each,
        test_share=config.test_per_class / of_each,
        max_train_steps=config.max_train_steps,
        validation_steps=25,
        seed=seed,
        random_flip=True,
        **fields,
    )
    print(method, f"{rate:.3g}", seed, report["accuracy"], report["train_seconds"], flush=True)
    return report


def compare(config: BenchmarkConfig, work: Path, method: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a method on all seeds at all its learning rates; give figures at the best one and every run."""
    own = config.probe_learning_rate if method in PROBES else own_rate(f"classify/{method}")
    rates = rates_around(own, config.trials, 3)
    trials = {rate: [run(config, work, method, rate, seed) for seed in config.seeds] for rate in rates}
    best = max(rates, key=lambda rate: statistics.mean(r["accuracy"]["validation"] for r in trials[rate]))
    reports = trials[best]
    test = [100 * report["accuracy"]["test"] for report in reports]
    figures = {
        "learning_rate": float(f"{best:.3g}"),
        "test_accuracy": round(statistics.median(test), 2),
        "test_accuracy_min": round(min(test), 2),
        "test_accuracy_max": round(max(test), 2),
        "test_accuracy_mean": round(statistics.mean(test), 2),
        "train_accuracy": round(statistics.median(100 * report["accuracy"]["train"] for report in reports), 2),
        "trained_numbers": reports[0]["num_trainable_parameters"]["adapter"],
        "statistics": reports[0]["num_trainable_parameters"]["statistics"],
        "share": round(reports[0]["trainable_share"], 6),
        "train_seconds": round(statistics.median(report["train_seconds"] for report in reports), 1),
    }
    runs = {
        f"{rate:.3g}": {str(s): r["accuracy"] for s, r in zip(config.seeds, trials[rate], strict=True)}
        for rate in rates
    }
    return figures, runs


def main(config: BenchmarkConfig) -> None:
    """Run everything and write the result file."""
    quiet_libraries()
    started = time.perf_counter()
    work = Path(config.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    base = prepare_base(config, work)
    figures: dict[str, float] = {
        "base_test_accuracy": round(100 * base["accuracy"]["test"], 2),
        "base_numbers": base["num_base_parameters"],
        "chance": round(100 / len(list((work / "target").iterdir())), 2),
    }
    runs: dict[str, Any] = {}
    for method in config.methods:
        found, runs[method] = compare(config, work, method)
        figures |= {f"{method}:{name}": value for name, value in found.items()}
    write_result(config.output, command_line("discriminative", config, ("work_dir", "output")), figures, runs=runs)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
