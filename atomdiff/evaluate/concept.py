"""A trained concept under the judge: subject similarity, scene accuracy and drift, against the bare base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from atomdiff.data import read_photos
from atomdiff.evaluate.drift import drift
from atomdiff.evaluate.fidelity import fidelity, mean_pairwise_similarity
from atomdiff.evaluate.prompt_match import prompt_match
from atomdiff.sample import generate
from atomdiff.toybox.judge import Judge
from atomdiff.toybox.places import PLACES

Pictures = list[Image.Image]
UNSEEN = "unseen"
_OTHER_CLASSES = ("cat", "house", "boat", "fish", "umbrella")


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
        return [f"a photo of a {kinds[i % len(kinds)]} {PLACES[scene][0]}" for i, scene in enumerate([*PLACES] * 2)]

    def draw(self, pipe: Any, prompts: list[str]) -> Pictures:
        """One picture a prompt, each from a seed of its own."""
        return generate(
            pipe,
            prompts,
            seeds=range(self.first_seed, self.first_seed + len(prompts)),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            batch_size=len(prompts),
            progress=False,
        )


@dataclass(frozen=True)
class Answers:
    """What a pipeline drew in an exam."""

    subject: Pictures
    bystanders: Pictures


def sit(exam: Exam, pipe: Any, subject: str) -> Answers:
    """Let a pipeline, with or without a concept in it, draw the exam."""
    return Answers(exam.draw(pipe, exam.prompts(subject)), exam.draw(pipe, exam.bystanders()))


def unseen_scenes(judge: Judge, photos: Pictures) -> tuple[str, ...]:
    """The places that the judge sees in none of the photos (all of them, if it sees every place in some photo)."""
    seen = set(judge.classify(photos)["scene"])
    return tuple(scene for scene in PLACES if scene not in seen) or tuple(PLACES)


def subject_photos(folder: Path) -> tuple[Pictures, Pictures, bool]:
    """Training photos of a subject, photos to compare with, and whether those are unseen ones.

    The latter come from the folder `unseen` in it; without one, the training photos themselves are compared with.
    """
    photos = [photo.picture for photo in read_photos(str(folder), minimum_side=32)]
    if (folder / UNSEEN).is_dir():
        return photos, [photo.picture for photo in read_photos(str(folder / UNSEEN), minimum_side=32)], True
    return photos, photos, False


def score(exam: Exam, judge: Judge, references: Pictures, base: Answers, concept: Answers) -> dict[str, Any]:
    """The figures of one concept.

    Returns:
        similarity: `base`, `concept`: mean cosine similarity to the reference photos; `real`: of those to each other;
            `gain`: the concept's share of the way from base to real.
        scene_accuracy: share of pictures whose scene the judge recognises, `base` and `concept`.
        drift: root mean square distance, 0 to 1, of the bystanders' pictures from the base's.
    """
    embed: Callable[[Pictures], Any] = judge.embed
    real = embed(references)
    similarity = {
        "base": fidelity(embed(base.subject), real),
        "concept": fidelity(embed(concept.subject), real),
        "real": mean_pairwise_similarity(real),
    }
    similarity["gain"] = (similarity["concept"] - similarity["base"]) / (similarity["real"] - similarity["base"])
    scenes = {
        name: prompt_match(judge.classify(answers.subject)["scene"], exam.rows)
        for name, answers in (("base", base), ("concept", concept))
    }
    return {
        "similarity": {name: round(value, 4) for name, value in similarity.items()},
        "scene_accuracy": {name: round(value, 4) for name, value in scenes.items()},
        "drift": round(drift(base.bystanders, concept.bystanders), 4),
    }
