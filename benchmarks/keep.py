"""Likeness, prompts and drift of concepts of which only the most important directions are kept.

    python -m benchmarks.keep --concepts out/compare_methods/atoms/default/0.0014/subjects-*-seed0/run/*.safetensors

Every concept, named like its subject, is evaluated at each share by `atomdiff evaluate`, with the judge of the toybox
and the sampling settings of the run; beside that stands the size of the pruned file. Figures are means over the
concepts, with their standard errors; at a share of 0 the trigger word is left. The first protocol tells similarity,
scenes, drift and diversity, the second prompt match, as in the comparison of methods.
`benchmarks.methods_plots.draw_keep` draws them.

Prediction, written before the first run: likeness comes with the first directions, so that half of them keep nine
tenths of the gain and three tenths keep two thirds; drift falls as the kept change does, more slowly than likeness:
with three tenths of the directions there is .8 of the drift. Prompt match rises by less than .1 from all directions to
three tenths.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import Summary, summarize, trial_figures
from benchmarks.trials import share_base_images


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    concepts: tuple[str, ...]
    """Concept files, named like the folders of their subjects."""
    keeps: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    """Shares of their directions that are kept."""
    config: str = "configs/demo.yaml"
    """The training config of the concepts; its base and sampling settings are those of the evaluation."""
    reference_data_dir: str = "samples/subjects"
    """A folder of images for each subject."""
    protocols: tuple[str, ...] = ("toybox", "toybox_edits")
    """Protocols of the evaluation."""
    num_prompts: int | None = None
    """Use only the first so many prompts. Default: all."""
    work_dir: str = "out/keep"
    """Folder of images and pruned files; images that exist are kept."""
    output: str = "benchmarks/results/keep.json"
    """The result file."""


def measure(config: BenchmarkConfig, keep: float) -> Summary:
    """Return the figures at one share, as means over the concepts."""
    folder = Path(config.work_dir) / f"{keep:g}"
    found = {protocol: _evaluate(config, keep, protocol, folder / Path(protocol).stem) for protocol in config.protocols}
    figures = {}
    for file in config.concepts:
        subject = Path(file).name.partition(".")[0]
        metrics = {protocol: subjects[subject]["metrics"]["toybox"] for protocol, subjects in found.items()}
        photos = str(Path(config.reference_data_dir) / subject)
        of_subject = trial_figures({"metrics": metrics, "trial": {"photos": photos}})
        figures[subject] = [of_subject | {"file_bytes": _pruned_bytes(folder, file, keep)}]
    return summarize(figures)


def _evaluate(config: BenchmarkConfig, keep: float, protocol: str, folder: Path) -> dict[str, Any]:
    """Evaluate the concepts by a protocol; return what results.json says of each subject."""
    from atomdiff.cli.evaluate import evaluate_concepts
    from atomdiff.evaluate.config import EvaluateConfig
    from atomdiff.training.config import load_config
    from atomdiff.utils.assets import find_asset

    run = load_config(["--config", config.config, "--instance_data_dir", "photos", "--class_name", "subject"])
    base = find_asset(run.pretrained_model_name_or_path)
    share_base_images(folder, base, Path(config.work_dir))
    evaluate_concepts(
        EvaluateConfig(
            pretrained_model_name_or_path=base,
            concepts=config.concepts,
            weights=({"keep": keep},) * len(config.concepts),
            reference_data_dir=config.reference_data_dir,
            protocol=protocol,
            encoders=("toybox",),
            output_dir=str(folder),
            num_prompts=config.num_prompts,
            num_inference_steps=run.num_inference_steps,
            guidance_scale=run.guidance_scale,
            sample_batch_size=run.sample_batch_size,
        )
    )
    subjects: dict[str, Any] = json.loads((folder / "results.json").read_text())["subjects"]
    return subjects


def _pruned_bytes(folder: Path, file: str, keep: float) -> int:
    from atomdiff.concepts.prune import PruneConfig, prune_file

    return prune_file(PruneConfig(file=file, output=str(folder / "files" / Path(file).name), keep=keep)).bytes


def main(config: BenchmarkConfig) -> None:
    """Measure at all shares and write the result file."""
    quiet_libraries()
    found = {f"{keep:g}": measure(config, keep) for keep in config.keeps}
    figures = {f"{keep}:{name}": each["mean"] for keep, summary in found.items() for name, each in summary.items()}
    write_result(config.output, command_line("keep", config, ignore=("output", "work_dir")), figures, summary=found)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.keep"))
