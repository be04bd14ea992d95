"""A trained concept under the judge: subject similarity, scene accuracy and drift, against the bare base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from atomdiff.data.images import read_images
from atomdiff.evaluate.drift import drift
from atomdiff.evaluate.fidelity import fidelity, mean_pairwise_similarity
from atomdiff.evaluate.prompt_match import prompt_match
from atomdiff.sampling.generate import generate_each
from atomdiff.toybox.judge import Judge
from atomdiff.toybox.places import PLACES
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.text import with_article

Pictures = list[Image.Image]
UNSEEN = "unseen"
_OTHER_CLASSES = ("cat", "house", "boat", "fish", "umbrella")
_BATCH = 12  # images at a time: larger batches are no faster, and the bar would stand still


@dataclass(frozen=True)
class Exam:
    """The prompts and seeds that a concept and its base are both asked to draw."""

    class_name: str
    trigger_word: str
    scenes: tuple[str, ...]
    """Places that none of the subject's training photos show."""
    num_inference_steps: int
    guidance_scale: float
    seeds_per_scene: int = 4
    first_seed: int = 50_000
    """Far from any seed of training."""

    @property
    def rows(self) -> list[str]:
        """The scene of every picture of the subject."""
        return [scene for scene in self.scenes for _ in range(self.seeds_per_scene)]

    def prompts(self, subject: str) -> list[str]:
        """A prompt a picture, with `subject` such as "sks mug" or "a mug" put in."""
        return [f"a photo of {subject} {PLACES[scene][0]}" for scene in self.rows]

    def bystanders(self) -> list[str]:
        """Prompts that do not name the concept: its class, and other classes, in all scenes of the world."""
        kinds = (self.class_name, *(kind for kind in _OTHER_CLASSES if kind != self.class_name))
        subjects = [with_article(kind) for kind in kinds]
        return [f"a photo of {subjects[i % len(kinds)]} {PLACES[scene][0]}" for i, scene in enumerate([*PLACES] * 2)]


@dataclass(frozen=True)
class Answers:
    """What a pipeline drew in an exam."""

    subject: Pictures
    bystanders: Pictures


def sit(exam: Exam, pipe: Any, subject: str, phase: str = "images", precision: Any = None) -> Answers:
    """Let a pipeline, with or without a concept in it, draw the exam, each picture from a seed of its own.

    Args:
        exam: the prompts.
        pipe: the pipeline.
        subject: what the prompts name, such as "sks mug" or "a mug".
        phase: name of the progress bar.
        precision: a context manager such as autocast to draw in.
    """
    named, unrelated = exam.prompts(subject), exam.bystanders()
    prompts = [*named, *unrelated]
    seeds = [exam.first_seed + number for group in (named, unrelated) for number in range(len(group))]
    settings: dict[str, Any] = {"num_inference_steps": exam.num_inference_steps, "guidance_scale": exam.guidance_scale}
    with precision or nullcontext():
        pictures = list(
            ProgressBar(generate_each(pipe, prompts, seeds, _BATCH, **settings), phase, len(prompts), unit="images")
        )
    return Answers(pictures[: len(named)], pictures[len(named) :])


def unseen_scenes(judge: Judge, photos: Pictures) -> tuple[str, ...]:
    """The places that the judge sees in none of the photos (all of them, if it sees every place in some photo)."""
    seen = set(judge.classify(photos)["scene"])
    return tuple(scene for scene in PLACES if scene not in seen) or tuple(PLACES)


def subject_photos(folder: Path) -> tuple[Pictures, Pictures, bool]:
    """Training photos of a subject, photos to compare with, and whether those are unseen ones.

    The latter come from the folder `unseen` in it; without one, the training photos themselves are compared with.
    """
    photos = [photo.rgb for photo in read_images(str(folder), minimum_side=32)]
    if (folder / UNSEEN).is_dir():
        return photos, [photo.rgb for photo in read_images(str(folder / UNSEEN), minimum_side=32)], True
    return photos, photos, False


def score(exam: Exam, judge: Judge, references: Pictures, base: Answers, concept: Answers) -> dict[str, Any]:
    """The figures of one concept.

    Returns:
        similarity: `base`, `concept`: mean cosine similarity to the reference photos; `real`: of those to each other;
            `gain`: the concept's share of the way from base to real. A single photo leaves the last two None.
        scene_accuracy: share of pictures whose scene the judge recognises, `base` and `concept`.
        drift: root mean square distance, 0 to 1, of the bystanders' pictures from the base's.
    """
    embed: Callable[[Pictures], Any] = judge.embed
    real = embed(references)

    def near(pictures: Pictures) -> float:
        return fidelity(embed(pictures), real)

    similarity: dict[str, float | None] = {"base": near(base.subject), "concept": near(concept.subject)}
    similarity |= {"real": None, "gain": None}
    if len(references) > 1:
        between = mean_pairwise_similarity(real)
        way = between - near(base.subject)
        similarity |= {"real": between, "gain": (near(concept.subject) - near(base.subject)) / way if way else None}
    scenes = {
        name: prompt_match(judge.classify(answers.subject)["scene"], exam.rows)
        for name, answers in (("base", base), ("concept", concept))
    }
    return {
        "similarity": {name: None if value is None else round(value, 4) for name, value in similarity.items()},
        "scene_accuracy": {name: round(value, 4) for name, value in scenes.items()},
        "drift": round(drift(base.bystanders, concept.bystanders), 4),
    }
