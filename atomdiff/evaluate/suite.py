"""Prompt suite: what the base and an adapted model are both asked to generate, so that metrics can compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from atomdiff.data.images import read_images
from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.sampling.generate import generate_each
from atomdiff.utils.articles import with_article
from atomdiff.utils.progress import ProgressBar

Images = list[Image.Image]

SCENES = {
    "beach": "on the beach",
    "forest": "in the forest",
    "desert": "in the desert",
    "snow": "in the snow",
    "city": "on a city street",
    "kitchen": "in a kitchen",
    "space": "floating in space",
    "sea": "under the sea",
}
CLASSES = ("cat", "house", "boat", "fish", "umbrella")
UNSEEN_FOLDER = "unseen"
_BATCH_SIZE = 12  # larger batches are no faster, and the progress bar would stand still


@dataclass(frozen=True)
class PromptSuite:
    """Prompts and seeds for a subject, and for what has nothing to do with it."""

    class_name: str
    """What the subject is, in the base's words."""
    scenes: Mapping[str, str]
    """Label -> phrase of the scenes to put the subject in, best ones that its training images do not show."""
    unrelated_prompts: tuple[str, ...]
    """Prompts that do not name the subject."""
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    images_per_scene: int = 4
    first_seed: int = 50_000
    """Far from any seed of training."""

    @property
    def labels(self) -> list[str]:
        """The scene's label for each image of the subject."""
        return [label for label in self.scenes for _ in range(self.images_per_scene)]

    def prompts(self, subject: str) -> list[str]:
        """Return a prompt for each image of the subject.

        Args:
            subject: how the prompts name it, such as "sks mug", or "a mug" for the base.
        """
        return [f"a photo of {subject} {self.scenes[label]}" for label in self.labels]


@dataclass(frozen=True)
class GeneratedImages:
    """What a model generated from a prompt suite."""

    subject: Images
    unrelated: Images


@dataclass(frozen=True)
class Evaluation:
    """All that a metric may look at."""

    suite: PromptSuite
    encoder: ImageEncoder
    references: Images
    """Images of the subject, best ones that were not trained on."""
    base: GeneratedImages
    concept: GeneratedImages

    @property
    def both(self) -> dict[str, GeneratedImages]:
        """The images of the base and with the concept, by these names."""
        return {"base": self.base, "concept": self.concept}


def make_suite(
    class_name: str,
    scenes: Mapping[str, str] = SCENES,
    all_scenes: Mapping[str, str] = SCENES,
    other_classes: Sequence[str] = CLASSES,
    **settings: Any,
) -> PromptSuite:
    """Return a suite whose unrelated prompts name the class and others, in all scenes twice.

    Args:
        class_name: what the subject is, in the base's words.
        scenes: label -> phrase, for the images of the subject.
        all_scenes: label -> phrase, for the unrelated images.
        other_classes: what else the base knows.
        **settings: other fields of `PromptSuite`.
    """
    classes = [class_name, *(name for name in other_classes if name != class_name)]
    subjects = [with_article(name) for name in classes]
    phrases = [*all_scenes.values()] * 2
    unrelated = [f"a photo of {subjects[i % len(subjects)]} {phrase}" for i, phrase in enumerate(phrases)]
    return PromptSuite(class_name, scenes, tuple(unrelated), **settings)


def generate_images(
    suite: PromptSuite,
    pipe: Any,
    subject: str,
    progress: str = "images",
    precision: AbstractContextManager[Any] | None = None,
) -> GeneratedImages:
    """Generate a suite's images, each from a seed of its own.

    Args:
        suite: the prompts.
        pipe: any text-to-image pipeline of diffusers, with or without an adapter.
        subject: how the prompts name the subject.
        progress: name of the progress bar.
        precision: a context such as autocast to generate in.
    """
    named = suite.prompts(subject)
    prompts = [*named, *suite.unrelated_prompts]
    seeds = [suite.first_seed + i for group in (named, suite.unrelated_prompts) for i in range(len(group))]
    settings: dict[str, Any] = {
        "num_inference_steps": suite.num_inference_steps,
        "guidance_scale": suite.guidance_scale,
    }
    with precision or nullcontext():
        generated = generate_each(pipe, prompts, seeds, _BATCH_SIZE, **settings)
        images = list(ProgressBar(generated, progress, len(prompts), unit="images"))
    return GeneratedImages(images[: len(named)], images[len(named) :])


def unseen_scenes(encoder: ImageEncoder, images: Images, scenes: Mapping[str, str] = SCENES) -> dict[str, str]:
    """Return the scenes that the encoder recognizes in none of the images; all of them, if it finds each."""
    seen = set(encoder.recognize(images, [*scenes]))
    return {label: phrase for label, phrase in scenes.items() if label not in seen} or dict(scenes)


def read_subject(folder: Path) -> tuple[Images, Images, bool]:
    """Read the training images of a subject, images to compare with, and whether the latter are unseen ones.

    Those come from the folder `unseen` in it; without one, the training images themselves are compared with.
    """
    images = [image.rgb for image in read_images(str(folder), minimum_side=32)]
    if (folder / UNSEEN_FOLDER).is_dir():
        return images, [image.rgb for image in read_images(str(folder / UNSEEN_FOLDER), minimum_side=32)], True
    return images, images, False


def open_adapted(pipe: Any, path: Path) -> Any:
    """Return the pipeline with what was trained in it: a concept loaded, or the fully tuned pipeline in its place."""
    from diffusers import DiffusionPipeline

    from atomdiff.pipelines.load import load_atoms

    if (path / "model_index.json").is_file():
        tuned = DiffusionPipeline.from_pretrained(path)
        tuned.set_progress_bar_config(disable=True)
        return tuned
    load_atoms(pipe, path, "concept")
    return pipe
