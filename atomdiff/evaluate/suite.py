"""Prompt suite: what the base and an adapted model are both asked to generate, so that metrics can compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor

from atomdiff.data.images import read_images
from atomdiff.evaluate.encoders import ImageEncoder, Recognizer
from atomdiff.sampling.generate import generate_each
from atomdiff.utils.articles import add_article, fit_article, with_article
from atomdiff.utils.progress import ProgressBar

Images = list[Image.Image]
Model = Literal["base", "concept"]
Kind = Literal["subject", "unrelated", "prior"]

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
    prompts: tuple[str, ...]
    """Prompts for the subject, which `{subject}` stands for."""
    unrelated_prompts: tuple[str, ...]
    """Prompts that do not name the subject, one image each."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts for other individuals of the class, which `{subject}` stands for."""
    labels: tuple[Mapping[str, str], ...] = ()
    """What each of `prompts` asks for, by kind: {"scene": "snow"}; empty: they have no labels."""
    captions: tuple[str, ...] = ()
    """`prompts` as they were published, with the class; empty: it takes the place of `{subject}`."""
    images_per_prompt: int = 4
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    first_seed: int = 50_000
    """Far from any seed of training."""

    @property
    def class_prompts(self) -> list[str]:
        """The prompts for the subject with its class alone, for the base and for encoders of texts."""
        return [*self.captions] or self.name_class(self.prompts)

    def name_class(self, prompts: Sequence[str]) -> list[str]:
        """Return prompts with the class in place of `{subject}`: "a photo of {subject}" -> "a photo of a mug"."""
        fitted = [fit_article(add_article(prompt), self.class_name) for prompt in prompts]
        return [prompt.replace("{subject}", self.class_name) for prompt in fitted]

    def requests(self, subject: str | None) -> dict[Kind, list[tuple[str, int]]]:
        """Return prompt and seed of each image, by kind.

        The seeds are the same for all subjects, and differ between the images of a kind.

        Args:
            subject: how the prompts name the subject, such as "sks mug"; None: the class, for the base.
        """
        named = [fit_article(prompt, subject).replace("{subject}", subject) for prompt in self.prompts if subject]
        prompts: dict[Kind, list[str]] = {
            "subject": named or self.class_prompts,
            "unrelated": [*self.unrelated_prompts],
            "prior": self.name_class(self.prior_prompts),
        }
        counts = {"subject": self.images_per_prompt, "unrelated": 1, "prior": self.images_per_prompt}
        repeated = {kind: [prompt for prompt in each for _ in range(counts[kind])] for kind, each in prompts.items()}
        return {kind: [(p, self.first_seed + i) for i, p in enumerate(each)] for kind, each in repeated.items()}


@dataclass(frozen=True)
class GeneratedImages:
    """What a model generated from a prompt suite: the images of a prompt side by side, prompt by prompt."""

    subject: Images
    unrelated: Images
    prior: Images = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """All that a metric may look at."""

    suite: PromptSuite
    encoder: ImageEncoder
    references: Images
    """Images of the subject, best ones that were not trained on."""
    base: GeneratedImages
    concept: GeneratedImages
    _embedded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers of images.

        Raises:
            ValueError: the base's and the concept's do not fit the suite or each other, or there are no references.
        """
        if not self.references:
            raise ValueError("references=[]: expected at least one image of the subject")
        for kind in get_args(Kind):
            base, concept = (len(getattr(generated, kind)) for generated in self.both.values())
            expected = len(self.suite.prompts) * self.suite.images_per_prompt if kind == "subject" else base
            if not base == concept == expected:
                found = f"found {base} images by the base and {concept} with the concept"
                raise ValueError(f"{kind}: {found}; expected {expected} of both, in the order of the suite")

    @property
    def both(self) -> dict[Model, GeneratedImages]:
        """The images of the base and with the concept, by these names."""
        return {"base": self.base, "concept": self.concept}

    @property
    def reference_embeddings(self) -> Tensor:
        """Embeddings (m, e) of the references."""
        return self._embed("references", self.references)

    def embeddings(self, model: Model, kind: Kind) -> Tensor:
        """Return embeddings (n, e) of generated images; each image is embedded once."""
        return self._embed(f"{model} {kind}", getattr(self.both[model], kind))

    def by_prompt(self, values: Tensor) -> Tensor:
        """Return values of the images of the subject or the class (n,) as (prompts, images)."""
        return values.reshape(-1, self.suite.images_per_prompt)

    def _embed(self, key: str, images: Images) -> Tensor:
        if key not in self._embedded:
            self._embedded[key] = self.encoder.embed(images)
        return self._embedded[key]


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
        scenes: label -> phrase, for the images of the subject, best those that its training images do not show.
        all_scenes: label -> phrase, for the unrelated images.
        other_classes: what else the base knows.
        **settings: other fields of `PromptSuite`.
    """
    classes = [class_name, *(name for name in other_classes if name != class_name)]
    subjects = [with_article(name) for name in classes]
    phrases = [*all_scenes.values()] * 2
    unrelated = [f"a photo of {subjects[i % len(subjects)]} {phrase}" for i, phrase in enumerate(phrases)]
    prompts = tuple(f"a photo of {{subject}} {phrase}" for phrase in scenes.values())
    labels = tuple({"scene": label} for label in scenes)
    return PromptSuite(class_name, prompts, tuple(unrelated), labels=labels, **settings)


def generate_images(
    suite: PromptSuite,
    pipe: Any,
    subject: str | None,
    progress: str = "images",
    precision: AbstractContextManager[Any] | None = None,
) -> GeneratedImages:
    """Generate a suite's images, each from a seed of its own.

    Args:
        suite: the prompts.
        pipe: any text-to-image pipeline of diffusers, with or without an adapter.
        subject: as for `PromptSuite.requests`.
        progress: name of the progress bar.
        precision: a context such as autocast to generate in.
    """
    requests = suite.requests(subject)
    settings: dict[str, Any] = {
        "num_inference_steps": suite.num_inference_steps,
        "guidance_scale": suite.guidance_scale,
    }
    prompts, seeds = zip(*(each for of_kind in requests.values() for each in of_kind), strict=True)
    with precision or nullcontext():
        generated = generate_each(pipe, prompts, seeds, _BATCH_SIZE, **settings)
        images = iter(list(ProgressBar(generated, progress, len(prompts), unit="images")))
    return GeneratedImages(**{kind: [*islice(images, len(of_kind))] for kind, of_kind in requests.items()})


def unseen_scenes(encoder: Recognizer, images: Images, scenes: Mapping[str, str] = SCENES) -> dict[str, str]:
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


def open_adapted(pipe: Any, path: str | Path) -> Any:
    """Return the pipeline with what was trained in it: a concept loaded, or the fully tuned pipeline in its place."""
    from diffusers import DiffusionPipeline

    from atomdiff.pipelines.load import load_atoms

    if (Path(path) / "model_index.json").is_file():
        tuned = DiffusionPipeline.from_pretrained(path)
        tuned.set_progress_bar_config(disable=True)
        return tuned
    load_atoms(pipe, path, "concept")
    return pipe
