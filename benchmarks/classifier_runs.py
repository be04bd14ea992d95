"""Training runs of classifiers for comparisons: each is done once, and every method gets a learning rate of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.classifier_worlds import WORLDS, World
from benchmarks.experiments import EXPERIMENTS, own_rate, rates_around

SEARCH_SEED = 100  # no other seed is as high
_FACTOR = 3  # between learning rates
_PROBE_RATE = 2.7e-2  # of a head alone


@dataclass(frozen=True)
class Sizes:
    """How much a comparison trains."""

    train: int
    """Images a class to train on."""
    validation: int
    """Images a class to choose the step and the learning rate by."""
    test: int | None
    """Images a class to test on; None: all that are left."""
    steps: int
    """Steps of every method."""
    validation_steps: int = 25
    """Steps between validations."""
    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the ResNet's stages, of one block each."""


def train(folder: Path, **fields: Any) -> dict[str, Any]:
    """Train a classifier into this folder, or read what an earlier call reported."""
    from atomdiff.classify.config import ClassifyConfig
    from atomdiff.classify.train import train_classifier

    if (folder / "report.json").is_file():
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report
    return train_classifier(ClassifyConfig(**{"random_resized_crop": 0.8, **fields, "output_dir": str(folder)}))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of what tells a classifier from others: all of its folder but the preprocessing."""
    return sum(file.stat().st_size for file in folder.iterdir() if not file.name.startswith("preprocessor"))


class Comparison:
    """A world, its base, and the runs on its tasks, all in one folder."""

    def __init__(self, world: str, sizes: Sizes, work: Path) -> None:
        self.world: World = WORLDS[world]()
        self.sizes = sizes
        self.flips = world == "toybox"  # a mirrored digit is none
        self.work = work / world
        self.per_class = sizes.train + sizes.validation + (sizes.test or 0)
        if sizes.test is None:
            self.per_class = self.world.base_per_class

    def base(self) -> dict[str, Any]:
        """Draw the images of the base's own task and train it; give its report."""
        from transformers import ResNetConfig

        images = self.world.base.write(self.work / "images" / "base", self.world.base_per_class, seed=1)
        widths = list(self.sizes.widths)
        config = ResNetConfig(
            embedding_size=widths[0], hidden_sizes=widths, depths=[1] * len(widths), layer_type="basic"
        )
        config.save_pretrained(self.work / "architecture")
        return train(
            self.work / "base",
            pretrained_model_name_or_path=str(self.work / "architecture"),
            train_data_dir=str(images),
            from_scratch=True,
            adapter="full",
            learning_rate=3e-3,
            head_learning_rate=3e-3,
            lr_warmup_steps=min(50, self.world.base_steps),
            max_train_steps=self.world.base_steps,
            validation_steps=self.world.base_steps,
            resolution=self.world.resolution,
            random_flip=self.flips,
            mixed_precision="no",
        )

    def folder(self, task: str, method: str, rate: float, seed: int) -> Path:
        """The folder of a run."""
        return self.work / task / method / f"{rate:.3g}" / f"seed-{seed}"

    def images(self, task: str) -> Path:
        """The images of a task."""
        number = list(self.world.tasks).index(task)
        return self.world.tasks[task].write(self.work / "images" / task, self.per_class, seed=2 + number)

    def unseen_images(self, style: str) -> Path:
        """The images of the base's task in a style that nothing is trained on."""
        return self.world.unseen[style].write(self.work / "images" / style, self.per_class, seed=99)

    def fields(self, task: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """The options of a run, but for its folder; with "METHOD:frozen" statistics of batch norms stay as they are."""
        test = self.per_class - self.sizes.train - self.sizes.validation
        method, _, batch_norm = method.partition(":")
        adapter = {"adapter": str(EXPERIMENTS / "classify" / method / "adapter.json"), "learning_rate": rate}
        if method == "linear":
            adapter = {"adapter": "linear", "head_learning_rate": rate}
        return {
            "pretrained_model_name_or_path": str(self.work / "base" / "classifier"),
            "train_data_dir": str(self.images(task)),
            "validation_share": self.sizes.validation / self.per_class,
            "test_share": test / self.per_class,
            "max_train_steps": self.sizes.steps,
            "validation_steps": self.sizes.validation_steps,
            "logging_steps": self.sizes.validation_steps,
            "random_flip": self.flips,
            "mixed_precision": "no",
            "seed": seed,
            "batch_norm": batch_norm or None,
            **adapter,
        }

    def run(self, task: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Tune the base to a task by a method; give the report."""
        folder = self.folder(task, method, rate, seed)
        fresh = not (folder / "report.json").is_file()
        report = train(folder, **self.fields(task, method, rate, seed))
        if fresh:
            print(task, method, f"{rate:.3g}", seed, report["accuracy"], report["train_seconds"], flush=True)
        return report

    def best_rate(self, tasks: Sequence[str], method: str, trials: int, *, further: bool = False) -> float:
        """Search a method's learning rate: the highest mean validation accuracy over tasks, on a seed of its own.

        With `further`, rates beyond the first `trials` are tried until the best one has one on either side.
        """
        own = _PROBE_RATE if method == "linear" else own_rate(f"classify/{method}")
        found: dict[float, float] = {}
        rates = rates_around(own, trials, _FACTOR)
        while rates:
            for rate in rates:
                reports = [self.run(task, method, rate, SEARCH_SEED) for task in tasks]
                found[rate] = statistics.mean(report["accuracy"]["validation"] for report in reports)
            best = max(found, key=lambda rate: found[rate])
            ends = {min(found): best / _FACTOR, max(found): best * _FACTOR}
            rates = [ends[best]] if further and best in ends else []
        return best
