"""Concepts of finished trials in one pipeline of the base: what it is asked for, and whether the base is as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.protocol import load_protocol
from atomdiff.evaluate.suite import GeneratedImages, Images, PromptSuite, generate_images, read_subject
from atomdiff.utils.assets import find_asset
from benchmarks.trials import Trial, concept_path


def trigger_word(subject: str) -> str:
    """Return the word of a subject's concept."""
    return f"sks-{subject}"


def phrase_of(subject: str) -> str:
    """Return what prompts call a subject whose concept has its `trigger_word`."""
    return f"{trigger_word(subject)} {subject}"


def open_base(trial: Trial) -> Any:
    """Return the base's pipeline of a trial."""
    from diffusers import StableDiffusionPipeline

    from atomdiff.utils.precision import compute_device

    base = trial.config().pretrained_model_name_or_path
    pipe = StableDiffusionPipeline.from_pretrained(find_asset(base)).to(compute_device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_concepts(pipe: Any, trials: Mapping[str, Trial]) -> None:
    """Load the concepts of all subjects into a pipeline, each under its subject's name and word."""
    import atomdiff

    for subject, trial in trials.items():
        atomdiff.load_atoms(pipe, concept_path(trial), subject, trigger_word=trigger_word(subject))


def places_suite(trial: Trial, images_per_prompt: int) -> PromptSuite:
    """Return the places of a trial's first protocol that no training photo shows, sampled as its run says."""
    run, protocol = trial.config(), load_protocol(trial.protocols[0])
    subject = protocol.subject(trial.subject, None, Path(trial.photos).parent, alone=False)
    return PromptSuite(
        trial.subject,
        tuple(prompt.text for prompt in subject.prompts),
        (),
        images_per_prompt=images_per_prompt,
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
    )


def unrelated_suite(trial: Trial) -> PromptSuite:
    """Return the unrelated prompts of a trial's first protocol alone, sampled as its run says."""
    unrelated = load_protocol(trial.protocols[0]).unrelated_prompts
    return replace(places_suite(trial, 1), prompts=(), unrelated_prompts=unrelated)


def unseen_photos(trial: Trial, judge: ImageEncoder) -> Tensor:
    """Return the embeddings of the photos of a trial's subject that it did not train on."""
    return judge.embed(read_subject(Path(trial.photos))[1])


def generate(suite: PromptSuite, pipe: Any, phrase: str | None, progress: str, trial: Trial) -> GeneratedImages:
    """Generate a suite's images in the precision of a trial's run."""
    from atomdiff.utils.precision import autocast, compute_device

    precision = autocast(compute_device(), trial.config().mixed_precision)
    return generate_images(suite, pipe, phrase, progress, precision)


def same_images(first: Images, second: Images) -> bool:
    """Tell whether two lists have the same images, to the bit."""
    return [image.tobytes() for image in first] == [image.tobytes() for image in second]


def tensors_of(pipe: Any) -> dict[str, Tensor]:
    """Return the tensors of all models of a pipeline by path, without those of adapters."""
    from atomdiff.pipelines.models import pipeline_models
    from atomdiff.tuner.adapter_state import base_state_dict

    return {
        f"{component}.{path}": tensor
        for component, model in pipeline_models(pipe).items()
        for path, tensor in base_state_dict(model).items()
    }


def same_tensors(now: Mapping[str, Tensor], before: Mapping[str, Tensor], further_rows: bool) -> bool:
    """Tell whether tensors are what they were, to the bit; with `further_rows` they may have rows after those."""
    return now.keys() == before.keys() and all(
        torch.equal(now[path][: len(tensor)] if further_rows and tensor.ndim else now[path], tensor)
        for path, tensor in before.items()
    )


class Base:
    """The base before anything is loaded: its pipeline, and what it is compared with later."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.pipe = trial, open_base(trial)
        self.tensors = {path: tensor.clone() for path, tensor in tensors_of(self.pipe).items()}
        self.unet = {path: tensor.clone() for path, tensor in self.pipe.unet.state_dict().items()}
        self.images = self.unrelated("the base")

    def unrelated(self, progress: str) -> Images:
        """Generate the images of the unrelated prompts as the pipeline is now."""
        return generate(unrelated_suite(self.trial), self.pipe, None, progress, self.trial).unrelated

    def is_as_before(self, progress: str, *, further_rows: bool = False) -> bool:
        """Tell whether every tensor and image is what it was before, to the bit."""
        same = same_tensors(tensors_of(self.pipe), self.tensors, further_rows)
        return same_images(self.unrelated(progress), self.images) and same
