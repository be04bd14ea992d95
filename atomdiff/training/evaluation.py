"""What encoders find in images of a finished concept, for the report of its training."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from atomdiff.data.image_files import list_images
from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.encoders import open_encoders
from atomdiff.evaluate.protocol import load_protocol
from atomdiff.evaluate.run import generate_images, measure_concepts
from atomdiff.evaluate.subjects import Subject as EvaluatedSubject
from atomdiff.evaluate.suite import PromptSuite
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.concept_source import open_source
from atomdiff.training.config import Subject, TrainConfig
from atomdiff.training.report.write import extend_report
from atomdiff.training.training_images import choose_held_out

FOLDER = "evaluation"
_PROTOCOL, _IMAGES_PER_PROMPT = "quick", 2
_DTYPES: Mapping[str, Literal["float16", "bfloat16"]] = {"fp16": "float16", "bf16": "bfloat16"}


def evaluate_result(config: TrainConfig, path: Path, state: Any) -> None:
    """Measure the result of a run with the encoders of `evaluate_with`, and extend its report by what they find.

    What goes wrong is warned of: the result is saved. One of several processes raises it: the others would wait for it.

    Args:
        config: The run.
        path: Its result.
        state: accelerate's, of the processes that share the images.
    """
    folder = Path(config.output_dir)
    try:
        options = evaluation_config(config, path, state.mixed_precision)
        subjects = _subjects(config, path)
        generated = generate_images(options, subjects, state)
        if not state.is_main_process:
            return
        results = measure_concepts(options, generated, open_encoders(config.evaluate_with, state.device))
    except Exception as error:
        if state.num_processes > 1:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{path} is saved, but cannot be evaluated: {reason}", stacklevel=1)
        return
    metrics = {
        f"{encoder}, {name}": _describe(value)
        for encoder, of_encoder in results["mean"]["all"].items()
        for name, value in of_encoder.items()
        if value is not None
    }
    extend_report(folder, metrics, {"Evaluation": folder / FOLDER / "contact_sheet.png"}, _note(config, subjects))


def _describe(found: Any) -> Any:
    """Return what results.json has of a metric as a table shows it: means with their standard errors."""
    if not isinstance(found, dict):
        return found
    if "mean" not in found:
        return {name: _describe(value) for name, value in found.items()}
    error = found["standard_error"]
    return found["mean"] if error is None else f"{found['mean']:.4g} ± {error:.2g}"


def _note(config: TrainConfig, subjects: Sequence[EvaluatedSubject]) -> str:
    """Say what the errors are over, what images are compared with, and why there may be no `real` and no gain."""
    over = "subjects" if len(subjects) > 1 else "prompts"
    notes = [f"Values are means ± standard errors over {over}."]
    if not all(_holds_out(config, subject) for subject in config.subjects):
        notes.append(
            "Photos were not held out for every subject, so similarity is that to training photos, and highest for a "
            "concept that repeats them: hold some out (--validation_split, --validation_data_dir)."
        )
    if not any(len(subject.references) > 1 for subject in subjects):
        found = "The images are compared with a single photo, but real and normalized_gain need two or more"
        notes.append(
            f"{found}: hold more out (a higher --validation_split), or name a folder with --validation_data_dir."
        )
    return " ".join(notes)


def _holds_out(config: TrainConfig, subject: Subject) -> bool:
    return bool(config.validation_split or subject.validation_data_dir)


def evaluation_config(config: TrainConfig, path: Path, mixed_precision: str) -> EvaluateConfig:
    """Return how the images are generated: as the validation images, in the run's precision."""
    return EvaluateConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        single_file_config=config.single_file_config,
        concepts=(str(path),),
        reference_data_dir=config.subjects[0].instance_data_dir,
        protocol=_PROTOCOL,
        encoders=config.evaluate_with,
        output_dir=str(Path(config.output_dir) / FOLDER),
        dtype=_DTYPES.get(mixed_precision, "float32"),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        sample_batch_size=config.sample_batch_size,
    )


def _subjects(config: TrainConfig, path: Path) -> list[EvaluatedSubject]:
    protocol = load_protocol(_PROTOCOL)
    prompts = tuple(prompt.text for prompt in protocol.prompts["any"])
    concept = None if (path / "model_index.json").is_file() else open_source(str(path))
    subjects = []
    for subject in config.subjects:
        suite = PromptSuite(
            subject.class_name or "object",
            prompts,
            protocol.unrelated_prompts,
            protocol.prior_prompts if subject.class_name else (),
            images_per_prompt=_IMAGES_PER_PROMPT,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        references = tuple(_references(config, subject))
        subjects.append(
            EvaluatedSubject(subject.name, path, concept, AdapterWeight(), subject.phrase, suite, references, "any")
        )
    return subjects


def _references(config: TrainConfig, subject: Subject) -> Sequence[Path]:
    """Return the held-out images of a subject; without such, its instance images."""
    if subject.validation_data_dir:
        return list_images(Path(subject.validation_data_dir))
    files = list_images(Path(subject.instance_data_dir))
    held_out = choose_held_out(len(files), config.validation_split, config.seed, subject)
    return [files[index] for index in sorted(held_out)] or files
