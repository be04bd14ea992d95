from pathlib import Path

import pytest
import torch
from PIL import Image

from atomdiff.evaluate.metrics import METRICS, score
from atomdiff.evaluate.suite import (
    SCENES,
    Evaluation,
    GeneratedImages,
    generate_images,
    make_suite,
    open_adapted,
    read_subject,
    unseen_scenes,
)
from atomdiff.toybox import world as toybox
from atomdiff.toybox.judge import load_judge

SUBJECT_FOLDERS = sorted((Path(__file__).parents[2] / "samples" / "subjects").iterdir())
SUITE = make_suite(
    "mug", {label: toybox.SCENES[label] for label in ("snow", "city")}, toybox.SCENES, images_per_prompt=2
)

MUG, CAT = toybox.SUBJECTS["zigzag mug"], toybox.SUBJECTS["banded cat"]
TUNING_MUG = toybox.TUNING_SUBJECTS["starry mug"]


def views(individual, count, seed, scenes=tuple(toybox.SCENES)):
    """Images of one individual in the given scenes in turn."""
    index = torch.tensor([list(toybox.SCENES).index(scenes[i % len(scenes)]) for i in range(count)])
    seen = toybox.sample_views(count, torch.Generator().manual_seed(seed), scene_index=index)
    return toybox.to_images(toybox.render(individual.repeat(count), seen).images)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.mark.parametrize("folder", SUBJECT_FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_subject_has_photos_in_five_scenes_and_unseen_ones(folder, judge):
    images, references, unseen = read_subject(folder)
    assert len(images) == 5 and len(references) == 16 and unseen
    assert len(unseen_scenes(judge, images, toybox.SCENES)) == 3
    assert set(judge.classify(images + references)["class"]) == {folder.name}


def test_without_unseen_images_the_training_images_are_compared_with(tmp_path):
    for number, image in enumerate(views(CAT, 3, seed=1)):
        image.save(tmp_path / f"{number}.png")
    images, references, unseen = read_subject(tmp_path)
    assert len(images) == 3 and references == images and not unseen


def test_images_of_every_scene_leave_all_scenes_to_ask_for(judge):
    images = views(CAT, len(toybox.SCENES), seed=1)
    assert unseen_scenes(judge, images, toybox.SCENES) == toybox.SCENES


def test_prompts_name_subject_and_scene():
    requests = SUITE.requests("sks mug")
    assert requests["subject"] == [
        ("a photo of sks mug in the snow", 50_000),
        ("a photo of sks mug in the snow", 50_001),
        ("a photo of sks mug in the city", 50_002),
        ("a photo of sks mug in the city", 50_003),
    ]
    of_class = [prompt for prompt, _ in SUITE.requests(None)["subject"]]
    assert of_class == ["a photo of a mug in the snow"] * 2 + ["a photo of a mug in the city"] * 2
    assert requests["unrelated"] == [(prompt, 50_000 + i) for i, prompt in enumerate(SUITE.unrelated_prompts)]
    assert SUITE.labels == ({"scene": "snow"}, {"scene": "city"})
    assert len(SUITE.unrelated_prompts) == 2 * len(toybox.SCENES)
    assert not any("sks" in prompt for prompt in SUITE.unrelated_prompts)
    assert "a photo of a mug on the beach" in SUITE.unrelated_prompts


def test_articles_fit_the_classes():
    assert "a photo of an umbrella on the beach" in make_suite("umbrella").unrelated_prompts
    assert not any("a umbrella" in prompt for prompt in make_suite("mug").unrelated_prompts)


def generated(individual, scenes=("snow", "snow", "city", "city"), seed=5):
    return GeneratedImages(views(individual, 4, seed, scenes), views(individual, 3, seed + 1))


def scores(judge, references, base, concept):
    return score(Evaluation(SUITE, judge, references, base, concept))


def test_a_perfect_concept_goes_all_the_way_and_the_base_none(judge):
    base, perfect = generated(TUNING_MUG), generated(MUG)
    references = views(MUG, 6, seed=9)
    none = scores(judge, references, base, base)
    assert none["similarity"]["normalized_gain"] == 0 and none["drift"] == 0
    assert none["diversity"]["base"] == none["diversity"]["concept"] > 0
    full = scores(judge, references, base, perfect)
    assert full["similarity"]["normalized_gain"] > 0.9 and full["drift"] > 0.02
    assert full["scene_accuracy"] == {"base": 1.0, "concept": 1.0}


def test_forgotten_scenes_are_seen(judge):
    base, forgetful = generated(MUG), generated(MUG, scenes=("snow",))
    assert scores(judge, views(MUG, 4, seed=2), base, forgetful)["scene_accuracy"]["concept"] == 0.5


def test_a_single_reference_leaves_open_how_alike_images_are(judge):
    base, perfect = generated(CAT), generated(MUG)
    similarity = scores(judge, views(MUG, 1, seed=9), base, perfect)["similarity"]
    assert similarity["base"] < similarity["concept"] and similarity["real"] is similarity["normalized_gain"] is None


class MeanColor:
    """The smallest encoder: the mean color of an image, and the first label for all."""

    def embed(self, images):
        return torch.stack([torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float) for image in images])

    def recognize(self, images, labels):
        return [labels[0]] * len(images)


def test_a_suite_runs_on_any_pipeline_with_any_encoder_and_a_new_metric(tiny_pipe, tiny_pipe_folder, monkeypatch):
    suite = make_suite("dog", {"snow": SCENES["snow"]}, {"sea": SCENES["sea"]}, num_inference_steps=1)
    base = generate_images(suite, tiny_pipe, None)
    assert len(base.subject) == 4 and len(base.unrelated) == 2
    tuned = generate_images(suite, open_adapted(tiny_pipe, tiny_pipe_folder), "sks dog")
    references = [Image.new("RGB", (32, 32), (200, 30, 30))] * 2
    monkeypatch.setitem(METRICS, "brightness", lambda e: float(e.encoder.embed(e.concept.subject).mean()))
    found = score(Evaluation(suite, MeanColor(), references, base, tuned))
    judged = ["similarity", "scene_accuracy", "diversity", "vendi", "drift", "embedding_drift"]
    assert list(found) == [*judged, "brightness"]
    assert found["scene_accuracy"] == {"base": 1.0, "concept": 1.0} and 0 < found["brightness"] < 255
    assert found["drift"] == found["embedding_drift"] == 0  # the same weights, and other prompts
