"""The demo: photos of a subject in; a concept file, a before/after sheet, the training curve and a report out."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.assets import ASSETS, find_asset
from atomdiff.utils.atomic import new_file, write_json, write_png
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.progress import log
from atomdiff.utils.text import with_article
from atomdiff.utils.versions import versions

FILES = ("before_after.png", "training_curve.png", "report.json")


@dataclass(frozen=True)
class DemoConfig:
    """Teach the toybox's base a subject from a folder of photos and measure what it learnt.

    Raises:
        UserError: a path does not exist.
    """

    instance_data_dir: PathText = str(ASSETS / "samples" / "subjects" / "mug")
    """Folder of the subject's photos; photos in a folder `unseen` inside it are only compared with."""
    class_name: str | None = None
    """What the subject is, in the base's words: mug, robot, cat ... Default: the folder's name."""
    run: PathText = str(ASSETS / "configs" / "demo.yaml")
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
        The report, as written to `report.json`, and the paths `concept` and `base`.
    """
    from atomdiff.evaluate.concept import score, subject_photos
    from atomdiff.evaluate.size import stored_bytes, trained_numbers
    from atomdiff.toybox.judge import load_judge
    from atomdiff.training.dreambooth import load_config, train
    from atomdiff.utils.hashing import hash_file
    from atomdiff.utils.precision import choose_precision, compute_device

    started = time.perf_counter()
    output = Path(config.output_dir)
    arguments = ["--config", config.run, "--instance_data_dir", config.instance_data_dir, "--class_name", config.kind]
    arguments += ["--output_dir", str(output)]
    for name in ("adapter", "learning_rate"):
        if getattr(config, name) is not None:
            arguments += [f"--{name}", str(getattr(config, name))]
    run = load_config(arguments)
    photos, references, unseen = subject_photos(Path(config.instance_data_dir))
    warn_of_class(config.kind)
    concept_path = train(run)
    train_seconds = time.perf_counter() - started

    judge = load_judge()
    exam, base, concept = draw_answers(config, run, concept_path, photos, judge)
    log("judging the images")
    figures = score(exam, judge, references, base, concept)
    write_png(output / "before_after.png", draw_sheet(photos, exam, base.subject, concept.subject))
    draw_curve(output / "training_log.jsonl", output / "training_curve.png")
    device = compute_device()
    report = {
        "subject": Path(config.instance_data_dir).resolve().name,
        "file_bytes": stored_bytes(concept_path),
        "file_sha256": hash_file(concept_path),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "trained_numbers": trained_numbers(concept_path),
        **figures,
        "references": "unseen photos" if unseen else "training photos",
        "precision": f"{choose_precision(run.mixed_precision, device)} on {device.type}",
        "versions": versions(),
    }
    write_json(output / "report.json", report, indent=2)
    return report | {"concept": str(concept_path), "base": find_asset(run.pretrained_model_name_or_path)}


def warn_of_class(kind: str) -> None:
    """Warn if the toybox's base has no word for a class: its letters mean nothing to it."""
    from atomdiff.toybox.scenes import CLASSES

    if kind not in CLASSES:
        known = f"{', '.join(CLASSES[:-1])} and {CLASSES[-1]}"
        warnings.warn(f"the base has no word {kind!r}; give --class_name what comes closest of {known}", stacklevel=2)


def draw_answers(config: DemoConfig, run: Any, concept_path: Path, photos: list[Any], judge: Any) -> tuple[Any, ...]:
    """Let the base, then the concept draw the report's images.

    Returns:
        The exam, and what each of them drew.
    """
    from diffusers import StableDiffusionPipeline

    from atomdiff.evaluate.concept import Exam, sit, unseen_scenes
    from atomdiff.training.noise import set_training_scheduler
    from atomdiff.utils.precision import autocast, compute_device

    exam = Exam(
        class_name=config.kind,
        trigger_word=run.trigger_word,
        scenes=unseen_scenes(judge, photos),
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
    )
    device = compute_device()
    pipe = StableDiffusionPipeline.from_pretrained(find_asset(run.pretrained_model_name_or_path)).to(device)
    own, pipe.scheduler = pipe.scheduler, quick_scheduler(pipe.scheduler)
    precise = autocast(device, run.mixed_precision)
    base = sit(exam, pipe, with_article(config.kind), "images by the base", precise)
    pipe.scheduler = own
    set_training_scheduler(run, pipe)
    pipe = open_concept(pipe, concept_path).to(device)
    pipe.scheduler = quick_scheduler(pipe.scheduler)
    return exam, base, sit(exam, pipe, f"{run.trigger_word} {config.kind}", "images with the concept", precise)


def quick_scheduler(scheduler: Any) -> Any:
    """Return DPM-Solver++ (Lu et al., arXiv 2211.01095) for DDIM: its images of half the steps look the same."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(scheduler.config) if type(scheduler) is DDIMScheduler else scheduler


def describe_report(report: dict[str, Any]) -> str:
    """Return a report as a small table, with the files and two lines of Python that use the concept."""

    def line(name: str, *values: str) -> str:
        return f"{name:<14}" + "".join(f"{value:>9}" for value in values[:2]) + "".join(f"{v:>16}" for v in values[2:])

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    similarity, scenes, concept = report["similarity"], report["scene_accuracy"], Path(report["concept"])
    between = "between photos"
    told = [
        line("", "base", "concept", between),
        line("similarity", *(number(similarity[name]) for name in ("base", "concept", "real"))),
        line("scenes right", number(scenes["base"]), number(scenes["concept"])),
        line("drift", "", number(report["drift"])),
        "",
        f"size  {report['file_bytes']:,} bytes, {report['trained_numbers']:,} numbers",
        f"time  {report['total_seconds']:.0f} s, {report['train_seconds']:.0f} s of them training",
        f"in    {report['precision']}",
        "",
        *(str(path) for path in (concept, *(concept.parent / name for name in FILES))),
    ]
    if concept.is_file():
        told += ["", "In Python:", "", *(f"    {line}" for line in python_lines(concept, report["base"]))]
    return "\n".join(told)


def python_lines(concept: Path, base: str) -> list[str]:
    """Return two lines of Python that draw an image with a concept file and save it beside that."""
    from atomdiff.concepts.concept_file import read_delta_file

    phrase, image = read_delta_file(concept).trigger_phrase, concept.parent / "image.png"
    opened = f"diffusers.StableDiffusionPipeline.from_pretrained({base!r})"
    drawn = f'pipe("a photo of {phrase} in space", guidance_scale=4).images[0].save({str(image)!r})'
    return [
        f"import atomdiff, diffusers; pipe = {opened}",
        f'atomdiff.load_atoms(pipe, "{concept}"); {drawn}',
    ]


def open_concept(pipe: Any, path: Path) -> Any:
    """The pipeline with what was trained in it: a concept loaded, or the fully tuned pipeline in its place."""
    from diffusers import StableDiffusionPipeline

    from atomdiff.pipelines.load import load_atoms

    if (path / "model_index.json").is_file():
        tuned = StableDiffusionPipeline.from_pretrained(path)
        tuned.set_progress_bar_config(disable=True)
        return tuned
    load_atoms(pipe, path, "concept")
    return pipe


def draw_sheet(photos: list[Any], exam: Any, base: list[Any], concept: list[Any]) -> Any:
    """The before/after sheet: the photos, then one picture a scene by the base and with the concept."""
    from PIL import ImageOps

    from atomdiff.toybox.places import PLACES
    from atomdiff.utils.image_grid import make_image_grid

    phrases = [PLACES[scene][0] for scene in exam.scenes]
    side = max(192, *concept[0].size)  # photos may be much larger

    def fit(pictures: list[Any]) -> list[Any]:
        return [ImageOps.contain(picture.convert("RGB"), (side, side)) for picture in pictures]

    pick = range(0, len(base), exam.seeds_per_scene)
    rows = [photos[: len(phrases)], [base[i] for i in pick], [concept[i] for i in pick], [concept[i + 1] for i in pick]]
    named = f'"{exam.trigger_word} {exam.class_name}"'
    labels = ["the photos, elsewhere", f'the base: "{with_article(exam.class_name)}"', f"the concept: {named}"]
    return make_image_grid([fit(row) for row in rows], [*labels, "another seed"], phrases)


def draw_curve(log: Path, path: Path) -> None:
    """Plot the loss of the training log over the steps."""
    from matplotlib.figure import Figure

    from atomdiff.training.run_log import read_log

    lines = read_log(log)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="loss", title="training")
    axes.grid(alpha=0.3)
    with new_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
