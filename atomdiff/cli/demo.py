"""The demo: photos of a subject in; a concept file, a before/after sheet and reports of training and metrics out."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomdiff.utils.articles import with_article
from atomdiff.utils.assets import ASSETS, find_asset
from atomdiff.utils.atomic import write_json, write_png
from atomdiff.utils.fields import ConfigGroup, ExistingPath, NonNegativeFloat
from atomdiff.utils.paths import PathText
from atomdiff.utils.progress import log
from atomdiff.utils.versions import versions

if TYPE_CHECKING:
    from PIL import Image

    from atomdiff.evaluate.suite import Evaluation

FILES = ("before_after.png", "training_curve.png", "report.json", "report.html")


@dataclass(frozen=True)
class DemoConfig(ConfigGroup):
    """Teach the toybox's base a subject from a folder of photos and measure what it learned."""

    instance_data_dir: ExistingPath = str(ASSETS / "samples" / "subjects" / "mug")
    """Folder of the subject's images; those in a folder `unseen` inside it are held out, and compared with."""
    class_name: str | None = None
    """Class of the subject, in the base's words: mug, robot, cat ... Default: the folder's name."""
    run: ExistingPath = str(ASSETS / "configs" / "demo.yaml")
    """Training config, a YAML file."""
    adapter: PathText | None = None
    """Adapter config, a JSON file. Default: that of the training config."""
    learning_rate: NonNegativeFloat | None = None
    """Learning rate of the adapter. Default: that of the training config."""
    token_learning_rate: NonNegativeFloat | None = None
    """Learning rate of the token embedding. Default: that of the training config."""
    output_dir: PathText = "out/demo"
    """Output folder."""

    @property
    def subject_class(self) -> str:
        """The class of the subject."""
        return self.class_name or Path(self.instance_data_dir).resolve().name


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, generate, measure; leave everything in `config.output_dir`.

    Returns:
        The report, as written to `report.json`, the paths `concept` and `base`, and `guidance_scale`.
    """
    from atomdiff.evaluate.metrics import score
    from atomdiff.evaluate.size import num_trainable_parameters, stored_bytes
    from atomdiff.evaluate.suite import read_subject
    from atomdiff.training.dreambooth import train
    from atomdiff.training.report.write import extend_report
    from atomdiff.utils.hashing import hash_file
    from atomdiff.utils.precision import choose_precision, compute_device

    started = time.perf_counter()
    output = Path(config.output_dir)
    run = training_config(config)
    images, references, has_unseen = read_subject(Path(config.instance_data_dir))
    warn_of_class(config.subject_class)
    concept_path = train(run)
    train_seconds = time.perf_counter() - started

    evaluation = evaluate_concept(run, concept_path, images, references)
    log("judging the images")
    scores = score(evaluation)
    write_png(output / "before_after.png", make_sheet(evaluation, run.trigger_word, images))
    device = compute_device()
    report = {
        "subject": Path(config.instance_data_dir).resolve().name,
        "file_bytes": stored_bytes(concept_path),
        "file_sha256": hash_file(concept_path),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "num_trainable_parameters": num_trainable_parameters(concept_path),
        **scores,
        "references": "unseen photos" if has_unseen else "training photos",
        "precision": f"{choose_precision(run.mixed_precision, device)} on {device.type}",
        "versions": versions(),
    }
    write_json(output / "report.json", report, indent=2)
    extend_report(output, scores, {"Before and after": output / "before_after.png"})
    used = {"base": find_asset(run.pretrained_model_name_or_path), "guidance_scale": run.guidance_scale}
    return report | {"concept": str(concept_path), **used}


def training_config(config: DemoConfig) -> Any:
    """Return the training run of a demo."""
    from atomdiff.evaluate.suite import UNSEEN_FOLDER
    from atomdiff.training.config import load_config

    unseen = Path(config.instance_data_dir) / UNSEEN_FOLDER
    options = {
        "config": config.run,
        "instance_data_dir": config.instance_data_dir,
        "validation_data_dir": str(unseen) if unseen.is_dir() else None,
        "class_name": config.subject_class,
        "output_dir": config.output_dir,
        "adapter": config.adapter,
        "learning_rate": config.learning_rate,
        "token_learning_rate": config.token_learning_rate,
    }
    return load_config([f"--{name}={value}" for name, value in options.items() if value is not None])


def warn_of_class(class_name: str) -> None:
    """Warn if the toybox's base has no word for a class: its letters mean nothing to it."""
    from atomdiff.toybox.world import CLASSES

    if class_name not in CLASSES:
        known = f"{', '.join(CLASSES[:-1])} and {CLASSES[-1]}"
        warnings.warn(f"the base has no word {class_name!r}; set --class_name to the closest of {known}", stacklevel=2)


def evaluate_concept(
    run: Any, concept_path: Path, images: list[Image.Image], references: list[Image.Image]
) -> Evaluation:
    """Generate the prompt suite with the base, then with the concept.

    Args:
        run: the training config.
        concept_path: what was trained.
        images: those that it was trained on, so that the suite asks for other scenes.
        references: images to compare with.
    """
    from diffusers import StableDiffusionPipeline

    from atomdiff.evaluate.suite import Evaluation, generate_images, make_suite, open_adapted, unseen_scenes
    from atomdiff.toybox.judge import load_judge
    from atomdiff.toybox.world import SCENES
    from atomdiff.training.noise import set_training_scheduler
    from atomdiff.utils.precision import autocast, compute_device

    judge = load_judge()
    suite = make_suite(
        run.class_name,
        unseen_scenes(judge, images, SCENES),
        SCENES,
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
    )
    device = compute_device()
    precision = autocast(device, run.mixed_precision)
    pipe = StableDiffusionPipeline.from_pretrained(find_asset(run.pretrained_model_name_or_path)).to(device)
    base = generate_images(suite, pipe, None, "images by the base", precision)
    set_training_scheduler(run, pipe)
    pipe = open_adapted(pipe, concept_path).to(device)
    subject = f"{run.trigger_word} {suite.class_name}"
    concept = generate_images(suite, pipe, subject, "images with the concept", precision)
    return Evaluation(suite, judge, references, base, concept)


def describe_report(report: dict[str, Any]) -> str:
    """Return a report as a small table, with the files and two lines of Python that use the concept."""

    def line(name: str, *values: str) -> str:
        return f"{name:<14}" + "".join(f"{value:>9}" for value in values[:2]) + "".join(f"{v:>16}" for v in values[2:])

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    similarity, scenes, concept = report["similarity"], report["scene_accuracy"], Path(report["concept"])
    between = "between photos"
    lines = [
        line("", "base", "concept", between),
        line("similarity", *(number(similarity[name]) for name in ("base", "concept", "real"))),
        line("scenes right", number(scenes["base"]), number(scenes["concept"])),
        line("drift", "", number(report["drift"])),
        "",
        f"size  {report['file_bytes']:,} bytes, {report['num_trainable_parameters']:,} parameters",
        f"time  {report['total_seconds']:.0f} s, {report['train_seconds']:.0f} s of them training",
        f"in    {report['precision']}",
        "",
        *(str(path) for path in (concept, *(concept.parent / name for name in FILES))),
    ]
    if concept.is_file():
        lines += [
            "",
            "In Python:",
            "",
            *(f"    {line}" for line in python_lines(concept, report["base"], report["guidance_scale"])),
        ]
    return "\n".join(lines)


def python_lines(concept: Path, base: str, guidance_scale: float) -> list[str]:
    """Return two lines of Python that generate an image with a concept file and save it beside that."""
    from atomdiff.concepts.concept_file import read_concept_file

    phrase, image = read_concept_file(concept).trigger_phrase, concept.parent / "image.png"
    opened = f"diffusers.StableDiffusionPipeline.from_pretrained({base!r})"
    generated = (
        f'pipe("a photo of {phrase} in space", guidance_scale={guidance_scale:g}).images[0].save({str(image)!r})'
    )
    return [
        f"import atomdiff, diffusers; pipe = {opened}",
        f"atomdiff.load_atoms(pipe, {str(concept)!r}); {generated}",
    ]


def make_sheet(evaluation: Evaluation, trigger_word: str, images: list[Image.Image]) -> Image.Image:
    """Return the before/after sheet: the training images, then one image a scene by the base and with the concept."""
    from PIL import ImageOps

    from atomdiff.utils.image_grid import make_image_grid

    suite, base, concept = evaluation.suite, evaluation.base.subject, evaluation.concept.subject
    phrases = [prompt.split("{subject} ")[-1] for prompt in suite.prompts]
    side = max(192, *concept[0].size)  # photos may be much larger

    def fit(row: list[Image.Image]) -> list[Image.Image]:
        return [ImageOps.contain(image.convert("RGB"), (side, side)) for image in row]

    first, second = (range(start, len(base), suite.images_per_prompt) for start in (0, 1))
    rows = [images[: len(phrases)], [base[i] for i in first], [concept[i] for i in first], [concept[i] for i in second]]
    named = f'"{trigger_word} {suite.class_name}"'
    labels = ["the photos, elsewhere", f'the base: "{with_article(suite.class_name)}"', f"the concept: {named}"]
    return make_image_grid([fit(row) for row in rows], [*labels, "another seed"], phrases)
