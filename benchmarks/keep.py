"""Likeness, prompts and drift of concepts of which only the most important directions are kept.

    python -m benchmarks.keep --concepts out/compare_methods/atoms/default/0.0014/subjects-*-seed0/run/*.safetensors

Every concept, named like its subject, is evaluated at each share by `atomdiff evaluate`, with the judge of the toybox;
beside that stands the size of the pruned file. Figures are means over the concepts.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    concepts: tuple[str, ...]
    """Concept files, named like the folders of their subjects."""
    keeps: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    """Shares of their directions that are kept."""
    base: str = "samples/toybox-sd"
    """The base model."""
    reference_data_dir: str = "samples/subjects"
    """A folder of images for each subject."""
    protocol: str = "toybox"
    """Protocol of the evaluation."""
    num_prompts: int | None = None
    """Use only the first so many prompts. Default: all."""
    num_inference_steps: int | None = None
    """Denoising steps of an image. Default: as the base model has it."""
    work_dir: str = "out/keep"
    """Folder of images and pruned files; images that exist are kept."""
    output: str = "benchmarks/results/keep.json"
    """The result file."""


def measure(config: BenchmarkConfig, keep: float) -> dict[str, float]:
    """Return the means over the concepts at one share."""
    from atomdiff.cli.evaluate import evaluate_concepts
    from atomdiff.evaluate.config import EvaluateConfig

    folder = Path(config.work_dir) / f"{keep:g}"
    options: dict[str, Any] = {"num_inference_steps": config.num_inference_steps, "num_prompts": config.num_prompts}
    evaluate_concepts(
        EvaluateConfig(
            pretrained_model_name_or_path=config.base,
            concepts=config.concepts,
            weights=({"keep": keep},) * len(config.concepts),
            reference_data_dir=config.reference_data_dir,
            protocol=config.protocol,
            encoders=("toybox",),
            output_dir=str(folder),
            **{name: value for name, value in options.items() if value is not None},
        )
    )
    metrics = json.loads((folder / "results.json").read_text())["mean"]["all"]["toybox"]
    figures = {name: _mean(found) for name, found in metrics.items() if found is not None}
    return figures | {"file_bytes": statistics.mean(_pruned_bytes(folder, file, keep) for file in config.concepts)}


def _mean(found: Any) -> float:
    """Return the mean of a metric with the concepts."""
    value = found.get("concept", found) if isinstance(found, dict) else found
    return round(value["mean"] if isinstance(value, dict) else value, 4)


def _pruned_bytes(folder: Path, file: str, keep: float) -> int:
    from atomdiff.concepts.prune import PruneConfig, prune_file

    return prune_file(PruneConfig(file=file, output=str(folder / "files" / Path(file).name), keep=keep)).bytes


def main(config: BenchmarkConfig) -> None:
    """Measure at all shares and write the result file."""
    quiet_libraries()
    figures: dict[str, float] = {}
    for keep in config.keeps:
        figures |= {f"{keep:g}:{name}": value for name, value in measure(config, keep).items()}
    write_result(config.output, command_line("keep", config, ignore=("output", "work_dir")), figures)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.keep"))
