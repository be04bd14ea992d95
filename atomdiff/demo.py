"""The demo: photos of a subject in; a concept file, a before/after sheet, the training curve and a report out."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from atomdiff.atomic import new_file, write_json, write_png
from atomdiff.errors import UserError
from atomdiff.paths import PathText, expand_paths

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class DemoConfig:
    """Teach the toybox's base a subject from a folder of photos and measure what it learnt.

    Raises:
        UserError: a path does not exist.
    """

    instance_data_dir: PathText = str(ROOT / "samples" / "subjects" / "mug")
    """Folder of the subject's photos; photos in a folder `unseen` inside it are only compared with."""
    class_name: str | None = None
    """What the subject is, in the base's words: mug, robot, cat ... Default: the folder's name."""
    run: PathText = str(ROOT / "configs" / "demo.yaml")
    """YAML file of the training run."""
    adapter: PathText | None = None
    """JSON file of the method, in place of the run's."""
    learning_rate: float | None = None
    """Learning rate of the adapter, in place of the run's."""
    output_dir: PathText = "out/demo"
    """Folder for everything that the demo leaves."""

    def __post_init__(self) -> None:
        expand_paths(self)
        for name in ("instance_data_dir", "run"):
            if not Path(getattr(self, name)).exists():
                raise UserError(f"{name}={getattr(self, name)!r}: nothing is there; expected an existing path")

    @property
    def kind(self) -> str:
        """The class of the subject."""
        return self.class_name or Path(self.instance_data_dir).resolve().name


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, draw, measure; leave everything in `config.output_dir`.

    Returns:
        The report, as written to `report.json`.
    """
    from diffusers import StableDiffusionPipeline

    from atomdiff.dreambooth import load_config, train
    from atomdiff.evaluate.concept import Exam, score, sit, subject_photos, unseen_scenes
    from atomdiff.evaluate.size import stored_bytes, trained_numbers
    from atomdiff.noising import match_scheduler
    from atomdiff.toybox.judge import load_judge

    started = time.perf_counter()
    output = Path(config.output_dir)
    arguments = ["--config", config.run, "--instance_data_dir", config.instance_data_dir, "--class_name", config.kind]
    arguments += ["--output_dir", str(output)]
    for name in ("adapter", "learning_rate"):
        if getattr(config, name) is not None:
            arguments += [f"--{name}", str(getattr(config, name))]
    run = load_config(arguments)
    concept_path = train(run)
    train_seconds = time.perf_counter() - started

    judge = load_judge()
    photos, references, unseen = subject_photos(Path(config.instance_data_dir))
    exam = Exam(
        class_name=config.kind,
        trigger_word=run.trigger_word,
        scenes=unseen_scenes(judge, photos),
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
    )
    pipe = StableDiffusionPipeline.from_pretrained(run.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    base = sit(exam, pipe, f"a {config.kind}")
    match_scheduler(run, pipe)
    pipe = open_concept(pipe, concept_path)
    concept = sit(exam, pipe, f"{run.trigger_word} {config.kind}")
    figures = score(exam, judge, references, base, concept)

    write_png(output / "before_after.png", draw_sheet(photos, exam, base.subject, concept.subject))
    draw_curve(output / "training_log.jsonl", output / "training_curve.png")
    report = {
        "subject": Path(config.instance_data_dir).resolve().name,
        "file_bytes": stored_bytes(concept_path),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "trained_numbers": trained_numbers(concept_path),
        **figures,
        "references": "unseen photos" if unseen else "training photos",
        "versions": versions(),
    }
    write_json(output / "report.json", report, indent=2)
    return report | {"concept": str(concept_path)}


def open_concept(pipe: Any, path: Path) -> Any:
    """The pipeline with what was trained in it: a concept loaded, or the fully tuned pipeline in its place."""
    from diffusers import StableDiffusionPipeline

    from atomdiff.pipeline import load_atoms

    if (path / "model_index.json").is_file():
        tuned = StableDiffusionPipeline.from_pretrained(path)
        tuned.set_progress_bar_config(disable=True)
        return tuned
    load_atoms(pipe, path, "concept")
    return pipe


def draw_sheet(photos: list[Any], exam: Any, base: list[Any], concept: list[Any]) -> Any:
    """The before/after sheet: the photos, then one picture a scene by the base and with the concept."""
    from atomdiff.grid import grid
    from atomdiff.toybox.places import PLACES

    columns = max(len(photos), len(exam.scenes))
    phrases = [PLACES[scene][0] for scene in exam.scenes]
    each = exam.seeds_per_scene
    pick = range(0, len(base), each)
    rows = [list(photos), [base[i] for i in pick], [concept[i] for i in pick], [concept[i + 1] for i in pick]]
    named = f'"{exam.trigger_word} {exam.class_name}"'
    labels = ["the photos, elsewhere", f'the base: "a {exam.class_name}"', f"the concept: {named}", "another seed"]
    return grid(rows, labels, [*phrases, *[""] * (columns - len(phrases))])


def draw_curve(log: Path, path: Path) -> None:
    """Plot the loss of the training log over the steps."""
    from matplotlib.figure import Figure

    from atomdiff.progress import read_log

    lines = read_log(log)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="loss", title="training")
    axes.grid(alpha=0.3)
    with new_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def versions() -> dict[str, str]:
    """The versions that a figure depends on, and the machine."""
    names = ("atomdiff", "torch", "diffusers", "transformers", "accelerate", "peft")
    cores = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {**{name: version(name) for name in names}, "python": platform.python_version(), "machine": cores}
