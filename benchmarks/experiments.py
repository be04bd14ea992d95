"""The methods in configs/experiments, the learning rates at which a comparison tries each, and its trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.trials import Trial

EXPERIMENTS = Path(__file__).parents[1] / "configs" / "experiments"
MOST_TELLING = (
    "atoms/default",
    "lora/attention_r16",
    "atoms/tiny",
    "atoms/faithful",
    "lora/default",
    "token/default",
    "lora/attention_r1",
    "lora/conv_r4",
    "full/default",
    "oft/default",
    "lora/attention_r64",
    "dora/default",
    "lokr/default",
    "loha/default",
    "atoms/spatial",
    "atoms/attention",
    "atoms/conv",
    "vera/default",
    "ia3/default",
    "fourierft/default",
)
"""The methods that tell most about atoms, the first ones first."""


def all_methods() -> list[str]:
    """Return the methods: the folders of configs/experiments, but for those of classifiers."""
    folders = (str(file.parent.relative_to(EXPERIMENTS)) for file in EXPERIMENTS.rglob("adapter.json"))
    return sorted(folder for folder in folders if not folder.startswith("classify"))


def ordered_methods() -> list[str]:
    """Return all methods, the most telling ones first."""
    return [*MOST_TELLING, *(method for method in all_methods() if method not in MOST_TELLING)]


def read_adapter_fields(method: str) -> dict[str, Any]:
    """Return what the adapter.json of a method says."""
    fields: dict[str, Any] = json.loads((EXPERIMENTS / method / "adapter.json").read_text())
    return fields


def rate_option(method: str) -> str:
    """Return the option that is a method's learning rate: where no adapter is trained, that of the token."""
    return "learning_rate" if "learning_rate" in _overrides(method) else "token_learning_rate"


def own_rate(method: str) -> float:
    """Return the learning rate that stands beside the adapter of a method."""
    return float(_overrides(method)[rate_option(method)])


def chosen_rate(results: str, method: str) -> float:
    """Return the learning rate in a method's result file of a comparison; without one, the method's own.

    Args:
        results: folder of the result files.
        method: the method.
    """
    file = Path(results) / f"{method.replace('/', '-')}.json"
    rate = json.loads(file.read_text())["figures"].get("learning_rate") if file.is_file() else None
    return own_rate(method) if rate is None else float(rate)


def make_trial(
    method: str, rate: float, photos: Path, protocols: tuple[str, ...], seed: int, run: str, work_dir: str
) -> Trial:
    """Return a run of a method at a learning rate on a subject."""
    name = f"{photos.parent.name}-{photos.name}-seed{seed}"
    return Trial(
        str(Path(work_dir) / method / f"{rate:g}" / name),
        str(photos),
        read_adapter_fields(method),
        {rate_option(method): rate, "seed": seed},
        protocols,
        run,
        str(Path(work_dir) / "shared"),
    )


@dataclass(frozen=True)
class ComparedConcepts:
    """Concepts of `compare_methods.py`, at the learning rates of its result files; what is missing is trained."""

    run: str = "configs/demo.yaml"
    """Settings of the training runs and of sampling."""
    protocols: tuple[str, ...] = ("toybox", "toybox_edits")
    """Protocols of the comparison; the first one has the places and the unrelated prompts."""
    subjects_dir: str = "samples/subjects"
    """A folder of photos for each subject."""
    results: str = "benchmarks/results/methods"
    """Folder of the comparison's result files."""
    work_dir: str = "out/compare_methods"
    """Folder of the comparison's runs; finished ones are not repeated."""
    processes: int = 1
    """Training runs at a time."""

    def trial(self, method: str, subject: str, seed: int = 0) -> Trial:
        """Return the run of a method on a subject."""
        rate, photos = chosen_rate(self.results, method), Path(self.subjects_dir) / subject
        return make_trial(method, rate, photos, self.protocols, seed, self.run, self.work_dir)


def vary_trial(
    trial: Trial, name: str, adapter: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> Trial:
    """Return a run with other fields of the adapter or other options, in a folder with a name beside it."""
    return replace(
        trial,
        folder=f"{trial.folder}-{name}",
        adapter={**trial.adapter, **(adapter or {})},
        options={**trial.options, **(options or {})},
    )


def rates_around(rate: float, trials: int, factor: float) -> list[float]:
    """Return the learning rates of 1, 2 or 3 trials: `rate`, and that divided and multiplied by `factor`."""
    return [[rate], [rate / factor, rate], [rate / factor, rate, rate * factor]][trials - 1]


def _overrides(method: str) -> dict[str, Any]:
    overrides: dict[str, Any] = yaml.safe_load((EXPERIMENTS / method / "overrides.yaml").read_text())
    return overrides
