"""Steps to a validation loss: runs that start from the nearest concepts of a library beside cold starts.

    python -m benchmarks.warm_start

Every subject is trained cold; then again from each number of concepts of a library with the cold runs' concepts of all
other subjects. The validation loss is that on photos that no run trains on, at fixed noise. A run has arrived when it
has fallen by a share of what the subject's cold run makes it fall at its lowest; the probe's steps count. Runs that are
finished are not repeated.

Prediction, written before the first run: a start from one concept arrives at half of the fall in 0.8 times the steps of
a cold start (median over the subjects), and the mean of three in 0.7 times, since what concepts of one base have in
common (the look of its photos, one subject in the middle) is learned once; at nine tenths of the fall, which is what is
the subject's own, the probe costs as much as it saves: 1.0 times. The most similar concept has a cosine below 0.5.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.training.config import TrainConfig
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to compare."""

    subjects: tuple[str, ...] = ("mug", "robot", "cat", "car", "teapot", "bird", "mushroom", "house")
    """Folders under samples/subjects."""
    concepts: tuple[int, ...] = (1, 3)
    """How many of the nearest concepts a run starts from, one run for each."""
    shares: tuple[float, ...] = (0.5, 0.9)
    """Shares of the cold run's fall at which a run has arrived."""
    init_probe_steps: int = 20
    """Steps of the probe."""
    max_train_steps: int = 300
    """Steps of every run."""
    validation_loss_steps: int = 10
    """Steps between measurements."""
    config: str = "configs/demo.yaml"
    """Settings of the runs."""
    work_dir: str = "out/warm_start"
    """Folder of the runs."""
    output: str = "benchmarks/results/warm_start.json"
    """The result file."""


def train_subject(config: BenchmarkConfig, subject: str, folder: Path, **start: Any) -> tuple[Path, dict[int, float]]:
    """Train a subject, or find what an earlier call trained.

    Returns:
        The concept's file, and the validation loss by step.
    """
    from atomdiff.training.dreambooth import load_config, train
    from atomdiff.training.measurements import LOG_FILE

    photos = ROOT / "samples" / "subjects" / subject
    run: TrainConfig = dataclasses.replace(
        load_config(["--config", config.config, "--instance_data_dir", str(photos), "--class_name", subject]),
        output_dir=str(folder),
        validation_data_dir=str(photos / "unseen"),
        validation_loss_steps=config.validation_loss_steps,
        max_train_steps=config.max_train_steps,
        checkpointing_steps=0,
        **start,
    )
    file = folder / f"{subject}.atoms.safetensors"
    if not file.is_file():
        train(run)
    lines = map(json.loads, (folder / LOG_FILE).read_text().splitlines())
    return file, {line["step"]: line["validation_loss"] for line in lines}


def arrival(losses: dict[int, float], goal: float, probe_steps: int = 0) -> float:
    """The first measured step at which the loss is at most the goal, with the probe's; infinite if there is none."""
    return min((step + probe_steps for step, loss in losses.items() if loss <= goal), default=math.inf)


def compare(config: BenchmarkConfig) -> dict[str, float | None]:
    """Run all, and return medians over the subjects; None where most runs do not arrive."""
    from atomdiff.concepts.concept_file import read_concept_file

    work = Path(config.work_dir).absolute()
    cold = {subject: train_subject(config, subject, work / "cold" / subject) for subject in config.subjects}
    figures: dict[str, list[float]] = {}
    for subject, (_, losses) in cold.items():
        library = work / "libraries" / subject
        library.mkdir(parents=True, exist_ok=True)
        for other, (file, _) in cold.items():
            link = library / file.name
            if other != subject and not link.exists():
                link.symlink_to(file)
        goals = {share: losses[0] - share * (losses[0] - min(losses.values())) for share in config.shares}
        for share, goal in goals.items():
            figures.setdefault(f"cold:steps_{share:g}", []).append(arrival(losses, goal))
        for count in config.concepts:
            start = {"init_from": str(library), "init_concepts": count, "init_probe_steps": config.init_probe_steps}
            folder = work / f"warm-{count}" / subject
            file, warm = train_subject(config, subject, folder, **start)
            sources = read_concept_file(file).training.get("init_from", [])
            probe = config.init_probe_steps
            found = {f"steps_{share:g}": arrival(warm, goal, probe) for share, goal in goals.items()}
            found |= {f"times_{s:g}": found[f"steps_{s:g}"] / max(arrival(losses, g), 1) for s, g in goals.items()}
            found |= {"first_loss_over_cold": warm[0] / losses[0], "lowest_over_cold": _lowest(warm) / _lowest(losses)}
            found["similarity"] = max((each["similarity"] for each in sources), default=0.0)
            for name, value in found.items():
                figures.setdefault(f"{count}:{name}", []).append(value)
    return {name: _median(values) for name, values in figures.items()}


def _lowest(losses: dict[int, float]) -> float:
    return min(losses.values())


def _median(values: Sequence[float]) -> float | None:
    found = statistics.median(values)
    return round(found, 4) if math.isfinite(found) else None


def main(config: BenchmarkConfig) -> None:
    """Compare and write the result file."""
    quiet_libraries()
    write_result(config.output, command_line("warm_start", config, ignore=("output", "work_dir")), compare(config))


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.warm_start"))
