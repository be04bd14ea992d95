"""One base, many tasks: a small patch for each beside full copies, probes and interpolated weights.

    python -m benchmarks.patching
    python -m benchmarks.patching --world digits

A small ResNet is tuned to every task of a world (`benchmarks/classifier_worlds.py`) on few images, by full tuning (a
copy of the base for each task), by a linear probe, by atoms (the method "conv"), and by what else can be a patch. All
patches of a method are then loaded into one model, and compared to the bit: the logits of each with those of the
classifier alone; and those of the base, once all are switched off, and again once they are unloaded, with those before.
Full copies share no weights with a base, so that no model holds several. Each method's learning rate has the highest
mean validation accuracy over the tasks of three, on a seed that is not used afterwards; accuracies are means over the
other seeds.

Full copies are also interpolated with the base, W0 + a (W - W0) with W0 the base and W the copy, running statistics of
batch norms included, as in PAINT (Ilharco et al., "Patching open-vocabulary models by interpolating weights", arXiv
2208.05592). There one head of text embeddings serves all tasks; here the base and each task have heads of their own, so
that only the network before them is interpolated: accuracy of the base's head on the base's task against that of the
task's head on the task. Atoms are two points: switched off for the base's task, or left on.

"unseen" is zero-shot adaptation to a style: the base's task in pencil and in chalk, for what was tuned to it in ink.

Expected before the first run: atoms come within 5 points of full copies on average and are above the probe on every
task but places; all patches together have less than 15 % of the copies' bytes; a switch takes less than 10 ms; at the a
that gives a task as much as atoms do, the base has lost more than 5 points; tuned to ink, atoms are better than the
base on chalk. (They were not; pencil, which is nearer to ink, was added then.)

Expected before LoRA, Mona and Conv-Adapter were added: base and patches of all answer to the bit. LoRA of rank 4 comes
within 2 points of atoms on average, of rank 1 (fewer parameters than atoms) 3 below them; Conv-Adapter and Mona 8 and
12 points below atoms, and above the probe on every task. All have less than 8 % of the copies' bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.classifier_runs import Comparison, Sizes, folder_bytes
from benchmarks.interpolation import interpolate
from benchmarks.patched_model import compare_patches
from benchmarks.result_file import command_line, write_result

FULL, ATOMS = "full", "conv"  # which the others are compared with
NAMES = {ATOMS: "atoms"}
"""Methods that have another name in the result file."""
SIZES = {"toybox": Sizes(16, 16, 40, 150), "digits": Sizes(16, 16, None, 150)}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to compare."""

    world: Literal["toybox", "digits"] = "toybox"
    """The images: drawn things, or handwritten digits (needs scikit-learn)."""
    methods: tuple[str, ...] = (FULL, "linear", ATOMS, "lora_conv_r4", "mona", "conv_adapter")
    """Folders under configs/experiments/classify, "full" and "conv" among them, or "linear" for the head alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs: images trained on, the head's first weights, batches."""
    trials: int = 3
    """Learning rates a method, 1 to 3."""
    max_train_steps: int | None = None
    """Steps of every run on a task. Default: 150."""
    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Weights of the copies in the interpolation."""
    work_dir: str = "out/classifiers"
    """Folder of the images and the runs; finished runs are not repeated."""
    output: str | None = None
    """The result file. Default: benchmarks/results/patching.json, or patching_digits.json."""


def splits_of(comparison: Comparison, task: str, seed: int) -> Any:
    """Return the images of a run by split, as the run chose them."""
    from atomdiff.classify.splits import read_splits

    fields = comparison.fields(task, "linear", 0.0, seed)
    return read_splits(fields["train_data_dir"], fields["validation_share"], fields["test_share"], seed)


def in_other_style(images: Any, folder: Path, other: Path) -> Any:
    """Return the images of the same names in another folder."""
    from atomdiff.classify.splits import LabeledFiles

    return LabeledFiles(tuple(other / file.relative_to(folder) for file in images.files), images.labels)


def accuracy(network: Any, head: Any, images: Any, processor: Any) -> float:
    """Return the accuracy in % of one model's head on the features of another's network."""
    import torch

    from atomdiff.classify.data import ImageDataset, evaluation_batches

    correct = 0
    with torch.no_grad():
        for pixels, labels in evaluation_batches(ImageDataset(images, processor), 128):
            logits = head.classifier(network.resnet(pixels).pooler_output)
            correct += int((logits.argmax(dim=1) == labels).sum())
    return 100 * correct / len(images)


class Patching:
    """The comparison, once every run is done."""

    def __init__(self, config: BenchmarkConfig, comparison: Comparison) -> None:
        from atomdiff.classify import open_base
        from atomdiff.classify.model import open_processor
        from atomdiff.classify.splits import read_splits

        self.config, self.comparison, self.tasks = config, comparison, list(comparison.world.tasks)
        self.methods = {NAMES.get(method, method): method for method in config.methods}
        self.rates = {n: comparison.best_rate(self.tasks, method, config.trials) for n, method in self.methods.items()}
        self.reports = {
            (task, name, seed): comparison.run(task, method, self.rates[name], seed)
            for task in self.tasks
            for name, method in self.methods.items()
            for seed in config.seeds
        }
        self.base_path = comparison.work / "base" / "classifier"
        self.base = open_base(str(self.base_path))
        self.processor = open_processor(str(self.base_path), self.base)
        self.base_images = read_splits(comparison.work / "images" / "base", 0.1, 0.2, 0).test

    def saved(self, task: str, name: str, seed: int) -> Path:
        """The folder of a trained classifier."""
        return self.comparison.folder(task, self.methods[name], self.rates[name], seed) / "classifier"

    def mean(self, values: Sequence[float]) -> float:
        """Round a mean to what is reported."""
        return round(statistics.mean(values), 2)

    def accuracies(self) -> dict[str, Any]:
        """Return test accuracies in % by task and method, and what is trained and stored."""
        figures: dict[str, Any] = {"base:accuracy": self.base_accuracy(self.base)}
        for task in self.tasks:
            for name in self.methods:
                test = [100 * self.reports[task, name, seed]["accuracy"]["test"] for seed in self.config.seeds]
                sizes = [folder_bytes(self.saved(task, name, seed)) for seed in self.config.seeds]
                figures |= {
                    f"{task}:{name}:accuracy": self.mean(test),
                    f"{task}:{name}:accuracy_min": round(min(test), 2),
                    f"{task}:{name}:accuracy_max": round(max(test), 2),
                    f"{task}:{name}:bytes": round(statistics.mean(sizes)),
                }
        for name in self.methods:
            report = self.reports[self.tasks[0], name, self.config.seeds[0]]
            figures[f"{name}:accuracy"] = self.mean([figures[f"{task}:{name}:accuracy"] for task in self.tasks])
            figures[f"{name}:bytes"] = sum(figures[f"{task}:{name}:bytes"] for task in self.tasks)
            figures[f"{name}:bytes_share"] = round(figures[f"{name}:bytes"] / figures["full:bytes"], 4)
            figures[f"{name}:learning_rate"] = float(f"{self.rates[name]:.3g}")
            figures[f"{name}:parameters"] = report["num_trainable_parameters"]["adapter"]
            figures[f"{name}:statistics"] = report["num_trainable_parameters"]["statistics"]
        figures["atoms:base_accuracy"] = figures["base:accuracy"]  # they are switched off for it
        return figures

    def base_accuracy(self, network: Any) -> float:
        """Return the accuracy of the base's head on the base's task, on the features of a network."""
        return round(accuracy(network, self.base, self.base_images, self.processor), 2)

    def one_model(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `compare_patches` does of the first seed's runs."""
        seed = self.config.seeds[0]
        folders = {name: [self.saved(task, name, seed) for task in self.tasks] for name in self.methods}
        copy = self.saved(self.tasks[0], FULL, seed)
        return compare_patches(self.base_path, folders, copy, self.comparison.world.resolution)

    def interpolation(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return base and new accuracy in % of interpolated copies, means over seeds and tasks, and those by task."""
        from atomdiff.classify import load_classifier, open_base

        moved = open_base(str(self.base_path))
        rows: list[dict[str, Any]] = []
        start = {path: tensor.clone() for path, tensor in moved.state_dict().items() if path.startswith("resnet.")}
        for task in self.tasks:
            for seed in self.config.seeds:
                images = splits_of(self.comparison, task, seed).test
                copy, atoms = (load_classifier(self.saved(task, name, seed)) for name in ("full", "atoms"))
                end = copy.state_dict()
                for alpha in self.config.alphas:
                    moved.load_state_dict(interpolate(start, end, alpha), strict=False)
                    rows.append({"task": task, "seed": seed, "alpha": alpha} | self._pair(moved, copy, images))
                rows.append({"task": task, "seed": seed, "alpha": "atoms"} | self._pair(atoms, atoms, images))
        figures = {}
        for point in (*self.config.alphas, "atoms"):
            for side in ("base", "new"):
                found = [row[side] for row in rows if row["alpha"] == point]
                figures[f"interpolation:{point}:{side}"] = self.mean(found)
        return figures, rows

    def _pair(self, network: Any, head: Any, images: Any) -> dict[str, float]:
        new = round(accuracy(network, head, images, self.processor), 2)
        return {"base": self.base_accuracy(network), "new": new}

    def unseen(self) -> dict[str, Any]:
        """Return accuracies in % of the base's task in ink, which was trained on, and in styles that were not."""
        from atomdiff.classify import load_classifier

        found: dict[str, list[float]] = {}
        ink_folder = self.comparison.images("ink")
        for seed in self.config.seeds:
            ink = splits_of(self.comparison, "ink", seed).test
            others = {style: self.comparison.unseen_images(style) for style in self.comparison.world.unseen}
            styles = {style: in_other_style(ink, ink_folder, folder) for style, folder in others.items()}
            frozen = ("ink", f"{ATOMS}:frozen", self.rates["atoms"], seed)
            self.comparison.run(*frozen)
            folders = {name: self.saved("ink", name, seed) for name in self.methods}
            folders["atoms, statistics frozen"] = self.comparison.folder(*frozen) / "classifier"
            for name, folder in {"base": self.base_path, **folders}.items():
                model = load_classifier(folder)
                for style, images in {"ink": ink, **styles}.items():
                    value = accuracy(model, model, images, self.processor)
                    found.setdefault(f"unseen:{name}:{style}", []).append(value)
        return {key: self.mean(values) for key, values in found.items()}


def check_methods(methods: Sequence[str]) -> None:
    """Check that the methods that others are compared with are there.

    Raises:
        UserError: they are not.
    """
    if not {FULL, ATOMS} <= {*methods}:
        raise UserError(f"methods: found {', '.join(methods)}; expected {FULL} and {ATOMS} among them: add them")


def main(config: BenchmarkConfig) -> None:
    """Run what is not done yet, and write the result file."""
    quiet_libraries()
    check_methods(config.methods)
    sizes = SIZES[config.world]
    if config.max_train_steps is not None:
        sizes = replace(sizes, steps=config.max_train_steps)
    comparison = Comparison(config.world, sizes, Path(config.work_dir))
    comparison.base()
    patching = Patching(config, comparison)
    curve, rows = patching.interpolation()
    together, refused = patching.one_model()
    figures = patching.accuracies() | together | curve | patching.unseen()
    name = "patching" if config.world == "toybox" else f"patching_{config.world}"
    output = config.output or f"benchmarks/results/{name}.json"
    command = command_line("patching", config, ("work_dir", "output"))
    write_result(output, command, figures, interpolation=rows, not_in_one_model=refused)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
