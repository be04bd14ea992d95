from pathlib import Path

import pytest

from atomdiff.evaluate.concept import Answers, Exam, score, subject_photos, unseen_scenes
from atomdiff.toybox.judge import load_judge
from atomdiff.toybox.places import PLACES
from atomdiff.toybox.scenes import SCENES, Individual
from atomdiff.toybox.shapes import SUBJECT_COLOURS
from atomdiff.toybox.subjects import SUBJECTS, views

SUBJECT_FOLDERS = sorted((Path(__file__).parents[2] / "samples" / "subjects").iterdir())
EXAM = Exam("mug", "sks", ("snow", "city"), num_inference_steps=2, guidance_scale=1, seeds_per_scene=2)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.mark.parametrize("folder", SUBJECT_FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_subject_has_photos_in_few_scenes_and_unseen_ones_in_the_others(folder, judge):
    photos, references, unseen = subject_photos(folder)
    assert 4 <= len(photos) <= 6 and len(references) >= 5 and unseen
    assert unseen_scenes(judge, photos) == ("desert", "snow", "city", "space", "sea")
    assert set(judge.classify(references)["class"]) == {SUBJECTS[folder.name].class_name}


def test_without_unseen_photos_the_training_photos_are_compared_with(tmp_path):
    for number, picture in enumerate(views(SUBJECTS["cat"], 3, seed=1)):
        picture.save(tmp_path / f"{number}.png")
    photos, references, unseen = subject_photos(tmp_path)
    assert len(photos) == 3 and references == photos and not unseen


def test_photos_in_every_scene_leave_all_scenes_to_ask_for(judge):
    assert unseen_scenes(judge, views(SUBJECTS["cat"], len(SCENES), seed=1)) == SCENES


def test_prompts_name_subject_and_scene():
    assert EXAM.prompts("sks mug") == ["a photo of sks mug in the snow"] * 2 + ["a photo of sks mug in the city"] * 2
    assert len(EXAM.bystanders()) == 2 * len(PLACES)
    assert not any("sks" in prompt for prompt in EXAM.bystanders())
    assert "a photo of a mug on the beach" in EXAM.bystanders()


def answers(individual, scenes=("snow", "snow", "city", "city"), seed=5):
    return Answers(views(individual, 4, seed, scenes), views(individual, 3, seed + 1))


def test_a_perfect_concept_goes_all_the_way_and_the_base_none(judge):
    subject = SUBJECTS["mug"]
    plain = Individual("mug", "striped", SUBJECT_COLOURS["lime"], SUBJECT_COLOURS["maroon"])
    base, perfect = answers(plain), answers(subject)
    references = views(subject, 6, seed=9)
    none = score(EXAM, judge, references, base, base)
    assert none["similarity"]["gain"] == 0 and none["drift"] == 0
    full = score(EXAM, judge, references, base, perfect)
    assert full["similarity"]["gain"] > 0.9 and full["drift"] > 0.02
    assert full["scene_accuracy"] == {"base": 1.0, "concept": 1.0}


def test_forgotten_scenes_are_seen(judge):
    subject = SUBJECTS["mug"]
    base, forgetful = answers(subject), answers(subject, scenes=("snow",))
    assert score(EXAM, judge, views(subject, 4, seed=2), base, forgetful)["scene_accuracy"]["concept"] == 0.5


def test_a_single_photo_to_compare_with_leaves_open_how_alike_photos_are(judge):
    base, perfect = answers(SUBJECTS["cat"]), answers(SUBJECTS["mug"])
    similarity = score(EXAM, judge, views(SUBJECTS["mug"], 1, seed=9), base, perfect)["similarity"]
    assert similarity["base"] < similarity["concept"] and similarity["real"] is similarity["gain"] is None
