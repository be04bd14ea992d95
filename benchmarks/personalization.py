"""Methods side by side on the shipped subjects: similarity, scenes, drift and size, each method at its best rate.

    python -m benchmarks.personalization --methods atoms/default lora/attention_r16 --trials 3

Every method goes through the same training run (configs/demo.yaml) with the same token, seed and number of
learning-rate trials: its own rate from overrides.yaml times 1/2, 1 and 2, each on the trial subjects. Similarity can be
bought with drift, so all methods get the same allowance: the best rate is that with the highest median of the
similarity gain, among those that keep scene accuracy at 90 % of the base's and drift within `max_drift`. The figures
are medians over all subjects at that rate.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import EXPERIMENTS, own_rate, rate_option, rates_around
from benchmarks.result_file import command_line, write_result

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to compare."""

    methods: tuple[str, ...] = ("atoms/default", "lora/attention_r16")
    """Folders under configs/experiments."""
    subjects: tuple[str, ...] = ("mug", "robot", "cat", "car", "teapot", "bird", "mushroom", "boat")
    """Folders under samples/subjects."""
    trial_subjects: tuple[str, ...] = ("mug", "robot")
    """Those of them on which the learning rate is chosen."""
    trials: int = 3
    """Learning rates a method, 1 to 3."""
    max_drift: float = 0.15
    """Highest median drift on the trial subjects at which a learning rate can be the best."""
    work_dir: str = "out/personalization"
    """Folder of the runs; finished runs are not repeated."""
    output: str = "benchmarks/results/personalization.json"
    """The result file."""
    sheet: str = "samples/results/subjects.png"
    """An image of every subject by the first method, at its best rate, seed 0."""


def run_trial(method: str, subject: str, rate: float, work_dir: Path) -> dict[str, Any]:
    """Train and measure one subject, or read what an earlier call measured."""
    from atomdiff.cli.demo import DemoConfig, run_demo

    folder = work_dir / method.replace("/", "-") / f"{rate:g}" / subject
    if (folder / "report.json").is_file():
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report
    return run_demo(
        DemoConfig(
            instance_data_dir=str(ROOT / "samples" / "subjects" / subject),
            adapter=str(EXPERIMENTS / method / "adapter.json"),
            output_dir=str(folder),
            **{rate_option(method): rate},
        )
    )


def summary(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over subjects."""

    def median(pick: Any) -> float:
        return round(statistics.median(pick(report) for report in reports), 4)

    return {
        "similarity_base": median(lambda r: r["similarity"]["base"]),
        "similarity": median(lambda r: r["similarity"]["concept"]),
        "similarity_real": median(lambda r: r["similarity"]["real"]),
        "gain": median(lambda r: r["similarity"]["normalized_gain"]),
        "scene_accuracy_base": median(lambda r: r["scene_accuracy"]["base"]),
        "scene_accuracy": median(lambda r: r["scene_accuracy"]["concept"]),
        "drift": median(lambda r: r["drift"]),
        "trained_numbers": median(lambda r: r["num_trainable_parameters"]),
        "file_bytes": median(lambda r: r["file_bytes"]),
        "train_seconds": median(lambda r: r["train_seconds"]),
        "total_seconds": median(lambda r: r["total_seconds"]),
    }


def draw_sheet(config: BenchmarkConfig, rate: float) -> None:
    """Draw a photo of every subject, the base's idea of its class and the first method's concept in other places."""
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from atomdiff.evaluate.suite import open_adapted
    from atomdiff.sampling.generate import generate
    from atomdiff.training.dreambooth import load_config
    from atomdiff.training.saving import result_path
    from atomdiff.tuner.read_config import read_adapter
    from atomdiff.utils.image_grid import make_image_grid

    adapter = read_adapter(str(EXPERIMENTS / config.methods[0] / "adapter.json"))
    demo = str(ROOT / "configs" / "demo.yaml")
    places = ("in the snow", "in the city", "under the sea")
    columns = []
    for subject in config.subjects:
        run = load_config(["--config", demo, "--instance_data_dir", subject, "--class_name", subject])
        home = Path(config.work_dir) / config.methods[0].replace("/", "-") / f"{rate:g}" / subject
        pipe = StableDiffusionPipeline.from_pretrained(run.pretrained_model_name_or_path)
        pipe.set_progress_bar_config(disable=True)
        settings: dict[str, Any] = {
            "num_inference_steps": run.num_inference_steps,
            "guidance_scale": run.guidance_scale,
            "progress": False,
        }
        before = generate(pipe, [f"a photo of a {subject} {places[0]}"], seeds=[0], **settings)
        pipe = open_adapted(pipe, result_path(adapter, home / subject))
        prompts = [f"a photo of {run.trigger_word} {subject} {place}" for place in places]
        after = generate(pipe, prompts, seeds=[0] * len(places), **settings)
        photo = Image.open(ROOT / "samples" / "subjects" / subject / "01.png")
        columns.append([photo, *before, *after])
    labels = ["one of five photos", f"the base, {places[0]}", *(f"the concept, {place}" for place in places)]
    Path(config.sheet).parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(list(zip(*columns, strict=True)), labels, config.subjects, scale=2).save(config.sheet)


def main(config: BenchmarkConfig) -> None:
    """Run all trials and write the result file."""
    quiet_libraries()
    figures: dict[str, float] = {}
    trials: dict[str, Any] = {}

    def measure(method: str, subjects: tuple[str, ...], rate: float) -> dict[str, float]:
        reports = [run_trial(method, subject, rate, Path(config.work_dir)) for subject in subjects]
        shown = {r["subject"]: {k: r[k] for k in ("similarity", "scene_accuracy", "drift")} for r in reports}
        trials[f"{method} {rate:g}"] = shown
        medians = summary(reports)
        print(method, rate, subjects, medians, flush=True)
        return medians

    for method in config.methods:
        rates = rates_around(own_rate(method), config.trials, 2)
        candidates = {rate: measure(method, config.trial_subjects, rate) for rate in rates}
        allowed = [
            rate
            for rate, c in candidates.items()
            if c["scene_accuracy"] >= 0.9 * c["scene_accuracy_base"] and c["drift"] <= config.max_drift
        ]
        best = max(allowed or candidates, key=lambda rate: candidates[rate]["gain"])
        figures[f"{method}:learning_rate"] = best
        chosen = measure(method, config.subjects, best)
        figures |= {f"{method}:{name}": value for name, value in chosen.items()}
    command = command_line("personalization", config, ("work_dir", "output", "sheet"))
    write_result(config.output, command, figures, trials=trials)
    draw_sheet(config, figures[f"{config.methods[0]}:learning_rate"])


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
