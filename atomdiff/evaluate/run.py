"""`atomdiff evaluate`: concepts x prompts x seeds -> images, then metrics by every encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from atomdiff.data.images import read_image
from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.metrics import as_json, measure
from atomdiff.evaluate.schedules import describe_schedule, schedule_of
from atomdiff.evaluate.size import num_trainable_parameters, stored_bytes
from atomdiff.evaluate.subjects import Subject
from atomdiff.evaluate.suite import Evaluation, GeneratedImages, Kind, Model
from atomdiff.evaluate.table import means_of_kinds, write_tables
from atomdiff.pipelines.prompt_syntax import weight_as_json
from atomdiff.pipelines.scheduler import ScheduleConfig
from atomdiff.sampling.batching import Sample
from atomdiff.sampling.prompt_requests import PromptRequest
from atomdiff.sampling.sample import image_settings, make_sample, save_missing
from atomdiff.utils.atomic import write_json, write_png
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.image_grid import make_image_grid
from atomdiff.utils.paths import check_writable, refuse_overlap
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.versions import versions

_SHEET_PROMPTS = 6
_SCHEDULE = "schedule"  # of the base's images, in the text of a PNG
Samples = dict[Model, dict[Kind, list[Sample]]]


def generate_images(config: EvaluateConfig, subjects: Sequence[Subject], state: Any) -> list[tuple[Subject, Samples]]:
    """Generate what is missing of the images of all subjects, by the base and with the concepts.

    Images of the base are shared by the subjects of a class whose concepts have one schedule.

    Args:
        config: how images are generated; with `score_only` all of them are there.
        subjects: what is generated, with which concepts.
        state: accelerate's, of the processes that share the work.

    Returns:
        Each subject with its images, by model and kind, in the order of its suite.

    Raises:
        UserError: the base is missing or cannot be used, or an image is broken; a photo cannot be read; or there are
            images missing that shall not be generated.
    """
    for subject in subjects:
        _read_references(subject)  # what cannot be read is said now, not after hours
    folder = Path(config.output_dir)
    reads = {f"the concept {subject.name}": subject.path for subject in subjects}
    refuse_overlap({"output_dir": folder}, {"the base": config.pretrained_model_name_or_path, **reads})
    check_writable(folder, f"output_dir={config.output_dir!r}")
    base = config.pretrained_model_name_or_path
    pipelines = {base: config.sampling(base)}
    pipelines |= {str(each.path): config.sampling(str(each.path)) for each in subjects if each.concept is None}
    settings = {name: {} if config.score_only else image_settings(each) for name, each in pipelines.items()}
    by_pipeline: dict[str, list[Sample]] = {name: [] for name in pipelines}
    generated = []
    for subject in subjects:
        own = base if subject.concept is not None else str(subject.path)
        samples: Samples = {
            "base": _base_samples(folder / "images", subject, schedule_of(subject, config), settings[base]),
            "concept": _concept_samples(folder / "images", subject, settings[own]),
        }
        generated.append((subject, samples))
        by_pipeline[base] += chain.from_iterable(samples["base"].values())
        by_pipeline[own] += chain.from_iterable(samples["concept"].values())
    unique = {name: [*{each.file.path: each for each in found}.values()] for name, found in by_pipeline.items()}
    if config.score_only:
        _check_saved(unique)
        return generated
    for name, found in unique.items():
        save_missing(pipelines[name], found, state, check_safety=False)  # it would black out some of them
    return generated


def _base_samples(
    folder: Path, subject: Subject, schedule: ScheduleConfig, settings: dict[str, str]
) -> dict[Kind, list[Sample]]:
    """Return the images of a subject's suite by the base, with a schedule that may not be its own."""
    described = describe_schedule(schedule)
    folder /= f"base-{described}" if described else "base"
    settings = settings | {_SCHEDULE: described}
    schedules = ((subject.name, schedule),) if described else ()
    requests = subject.suite.requests(None)
    return _samples(folder, requests, lambda prompt: PromptRequest(prompt, prompt, schedules=schedules), settings)


def _concept_samples(folder: Path, subject: Subject, settings: dict[str, str]) -> dict[Kind, list[Sample]]:
    """Return the images of a subject's suite with its concept."""
    requests = subject.suite.requests(subject.trigger_phrase)
    return _samples(folder / "concepts" / subject.name, requests, subject.request, settings)


def _samples(
    folder: Path,
    requests: Mapping[Kind, Sequence[tuple[str, int]]],
    request: Callable[[str], PromptRequest],
    settings: dict[str, str],
) -> dict[Kind, list[Sample]]:
    made = {prompt: request(prompt) for prompt in dict.fromkeys(p for each in requests.values() for p, _ in each)}
    return {
        kind: [make_sample(folder, made[prompt], seed, settings) for prompt, seed in each]
        for kind, each in requests.items()
    }


def _check_saved(by_pipeline: Mapping[str, Sequence[Sample]]) -> None:
    """Refuse images that are missing, or that one pipeline generated with different settings."""
    samples = [sample for each in by_pipeline.values() for sample in each]
    advice = "generate them without score_only"
    if missing := [sample.file.path for sample in samples if not sample.file.is_saved()]:
        found = f"{len(missing)} of {len(samples)} images are missing, or of another concept or weight"
        raise UserError(f"score_only=True: {found}; the first is {missing[0]}; {advice}")
    for each in by_pipeline.values():
        first, *others = [(sample.file.path, _read_settings(sample)) for sample in each]
        for path, settings in others:
            if differing := sorted(dict(settings.items() ^ first[1].items())):
                found = f"{first[0]} and {path} were generated with different {', '.join(differing)}"
                raise UserError(f"score_only=True: {found}; {advice}")


def _read_settings(sample: Sample) -> dict[str, str]:
    """Return the settings that images by one pipeline share."""
    return {key: value for key, value in sample.file.read_settings().items() if key not in ("concepts", _SCHEDULE)}


def _read_references(subject: Subject) -> list[Image.Image]:
    images = []
    for file in subject.references:
        try:
            images.append(read_image(file))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    return images


def measure_concepts(
    config: EvaluateConfig, generated: Sequence[tuple[Subject, Samples]], encoders: Mapping[str, ImageEncoder]
) -> dict[str, Any]:
    """Measure generated images, and write results.json, results.md and contact_sheet.png to the output folder.

    Args:
        config: the run.
        generated: what `generate_images` returns.
        encoders: the encoders by name.

    Returns:
        What results.json holds.
    """
    folder = Path(config.output_dir)
    measured: dict[str, dict[str, Any]] = {}
    rows = []
    for subject, samples in ProgressBar(generated, "measuring", len(generated), unit="subjects"):
        references = _read_references(subject)
        base, concept = (GeneratedImages(**_read(samples[model])) for model in ("base", "concept"))
        measured[subject.name] = {
            name: measure(Evaluation(subject.suite, encoder, references, base, concept))
            for name, encoder in encoders.items()
        }
        step = subject.suite.images_per_prompt
        shown = concept.subject[: step * _SHEET_PROMPTS : step]
        rows.append([ImageOps.contain(references[0], shown[0].size), *shown])  # photos may be much larger
    names = [subject.name for subject, _ in generated]
    write_png(folder / "contact_sheet.png", make_image_grid(rows, names))
    means = means_of_kinds(measured, {subject.name: subject.kind for subject, _ in generated})
    settings = _read_settings(generated[0][1]["base"]["subject"][0])
    results = {
        "protocol": config.protocol,
        "settings": {name: value for name, value in settings.items() if value},
        "versions": versions(),
        "subjects": {
            subject.name: _describe(subject) | {"metrics": as_json(measured[subject.name])} for subject, _ in generated
        },
        "mean": {kind: as_json(mean) for kind, mean in means.items()},
    }
    write_json(folder / "results.json", results)
    write_tables(folder / "results.md", measured, means)
    return results


def _read(samples: Mapping[Kind, Sequence[Sample]]) -> dict[str, list[Image.Image]]:
    return {kind: [read_image(sample.file.path) for sample in each] for kind, each in samples.items()}


def _describe(subject: Subject) -> dict[str, Any]:
    return {
        "kind": subject.kind,
        "class_name": subject.suite.class_name,
        "trigger_phrase": subject.trigger_phrase,
        "weight": weight_as_json(subject.weight),
        "concept": subject.path.name,
        "sha256": subject.concept.sha256 if subject.concept else hash_file(subject.path),
        "num_trainable_parameters": num_trainable_parameters(subject.path),
        "file_bytes": stored_bytes(subject.path),
        "num_references": len(subject.references),
        "num_prompts": len(subject.suite.prompts),
        "images_per_prompt": subject.suite.images_per_prompt,
    }
