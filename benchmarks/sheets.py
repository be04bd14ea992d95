"""The images of README and docs: subjects by one method, and methods side by side; and whether the judge knows them.

    python -m benchmarks.sheets

The concepts are those of `compare_methods.py`, seed 0, at the learning rates of its result files; what is missing
is trained. The prompts are three places that no training photo shows, and one other color. Nothing is chosen by its
looks: the seeds are fixed. Each image of a concept is compared with the photos of all evaluation subjects; the result
file has the share that is most like those of its own subject, and as which one each was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from atomdiff.evaluate.protocol import load_protocol
from atomdiff.evaluate.size import stored_bytes
from atomdiff.evaluate.suite import PromptSuite, generate_images, open_adapted, read_subject
from atomdiff.utils.assets import find_asset
from atomdiff.utils.atomic import write_png
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks import trial_runner
from benchmarks.experiments import ComparedConcepts
from benchmarks.methods_report import format_size
from benchmarks.recognition import Gallery
from benchmarks.result_file import command_line, write_result
from benchmarks.trials import Trial, concept_path

PLACES = 3


@dataclass(frozen=True)
class SheetsConfig(ComparedConcepts):
    """Draw the sheets."""

    method: str = "atoms/default"
    """Method of the sheet of subjects."""
    subjects: tuple[str, ...] = ("mug", "robot", "teapot", "cat", "house", "fish", "umbrella", "mushroom")
    """Subjects of that sheet."""
    methods: tuple[str, ...] = ("atoms/default", "atoms/tiny", "lora/attention_r16", "token/default", "full/default")
    """Methods of the sheet of methods."""
    methods_subjects: tuple[str, ...] = ("mug", "robot", "fish", "umbrella")
    """Subjects of that sheet."""
    edit: str = "a photo of a green {subject}"
    """What is asked for besides the places."""
    num_inference_steps: int = 40
    """Denoising steps of an image; those of `run` are chosen for speed."""
    images: str = "docs/images"
    """Folder of the sheets."""
    output: str = "benchmarks/results/sheets.json"
    """The result file."""


@dataclass(frozen=True)
class Pictured:
    """A subject by one method: its photos, and images of each prompt by the base and with the concept."""

    photos: list[Image.Image]
    base: list[Image.Image]
    concept: list[Image.Image]


def run_concepts(config: SheetsConfig, method: str, subjects: Sequence[str]) -> dict[str, Trial]:
    """Return the finished trials of a method on these subjects, those of the comparison where they are done.

    Raises:
        UserError: one has failed.
    """
    trials = [config.trial(method, subject) for subject in subjects]
    trial_runner.run_concepts(trials, config.processes)
    return dict(zip(subjects, trials, strict=True))


def prompts_of(config: SheetsConfig, subject: str) -> tuple[str, ...]:
    """Return the prompts of a subject: the first places that no training photo shows, and the edit."""
    found = load_protocol(config.protocols[0]).subject(subject, None, Path(config.subjects_dir), alone=False)
    return (*(prompt.text for prompt in found.prompts[:PLACES]), config.edit)


def picture(config: SheetsConfig, trial: Trial) -> Pictured:
    """Generate the images of a subject, by the base and with the concept, from the same noise."""
    from diffusers import StableDiffusionPipeline

    from atomdiff.utils.precision import autocast, compute_device

    run, device = trial.config(), compute_device()
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": run.guidance_scale}
    suite = PromptSuite(trial.subject, prompts_of(config, trial.subject), (), images_per_prompt=1, **settings)
    pipe = StableDiffusionPipeline.from_pretrained(find_asset(run.pretrained_model_name_or_path)).to(device)
    pipe.set_progress_bar_config(disable=True)
    base = generate_images(suite, pipe, None, "images by the base", autocast(device, run.mixed_precision))
    pipe = open_adapted(pipe, concept_path(trial)).to(device)
    precision = autocast(device, run.mixed_precision)
    concept = generate_images(suite, pipe, run.trigger_phrase, "images with the concept", precision)
    return Pictured(read_subject(Path(trial.photos))[0], base.subject, concept.subject)


def draw_subjects(config: SheetsConfig, pictured: Mapping[str, Pictured]) -> Image.Image:
    """Return the sheet of subjects: a column for each, with a photo, the base, the concept in places and recolored."""
    columns = [[each.photos[0], each.base[0], *each.concept] for each in pictured.values()]
    places = [f"the concept, place {number}" for number in range(1, len(columns[0]) - 2)]
    edit = config.edit.replace("{subject}", "...")
    labels = ["one of five photos", "the base, place 1", *places, f'the concept: "{edit}"']
    return make_image_grid(list(zip(*columns, strict=True)), labels, [*pictured], scale=1)


def draw_methods(config: SheetsConfig, pictured: Mapping[str, Mapping[str, Pictured]], sizes: list[str]) -> Image.Image:
    """Return the sheet of methods: a row for each, with every subject in the first place and recolored."""
    first = next(iter(pictured.values())).values()
    rows = [[image for each in first for image in each.photos[:2]]]
    rows.append([image for each in first for image in (each.base[0], each.base[-1])])
    rows += [
        [image for each in by.values() for image in (each.concept[0], each.concept[-1])] for by in pictured.values()
    ]
    edit = config.edit.replace("{subject}", "...")
    columns = [label for subject in config.methods_subjects for label in (subject, f'"{edit}"')]
    return make_image_grid(rows, ["photos", "the base", *sizes], columns, scale=1)


def recognition(gallery: Gallery, pictured: Mapping[str, Pictured]) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Return the shares of a method's images that are recognized, in places and recolored; and as what each is seen."""
    seen = {subject: gallery.recognize(each.concept) for subject, each in pictured.items()}
    places = [name == subject for subject, names in seen.items() for name in names[:-1]]
    edits = [names[-1] == subject for subject, names in seen.items()]
    shares = {"top_1": sum(places) / len(places), "top_1_recolored": sum(edits) / len(edits)}
    return {name: round(share, 4) for name, share in shares.items()}, seen


def main(config: SheetsConfig) -> None:
    """Draw both sheets and write the result file."""
    quiet_libraries()
    from atomdiff.toybox.judge import load_judge

    wanted = {method: config.methods_subjects for method in config.methods}
    wanted[config.method] = tuple(dict.fromkeys((*config.subjects, *wanted.get(config.method, ()))))
    trials = {method: run_concepts(config, method, subjects) for method, subjects in wanted.items()}
    pictured = {method: {name: picture(config, each) for name, each in by.items()} for method, by in trials.items()}
    own = {subject: pictured[config.method][subject] for subject in config.subjects}
    by_method = {m: {subject: pictured[m][subject] for subject in config.methods_subjects} for m in config.methods}
    stored = {method: stored_bytes(concept_path(next(iter(trials[method].values())))) for method in config.methods}
    sizes = [f"{method}, {format_size(count)}" for method, count in stored.items()]
    write_png(Path(config.images) / "subjects.png", draw_subjects(config, own))
    write_png(Path(config.images) / "methods.png", draw_methods(config, by_method, sizes))

    gallery = Gallery.read(load_judge(), Path(config.subjects_dir))
    figures, seen_as = recognition(gallery, own)
    found = {method: recognition(gallery, by) for method, by in by_method.items()}
    figures |= {f"{method}:{name}": share for method, (shares, _) in found.items() for name, share in shares.items()}
    command = command_line("sheets", config, ("work_dir", "processes", "images", "output"))
    write_result(config.output, command, figures, seen_as=seen_as)


if __name__ == "__main__":
    main(parse_config(SheetsConfig, prog="python -m benchmarks.sheets"))
