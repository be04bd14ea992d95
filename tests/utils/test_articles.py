import pytest

from atomdiff.toybox.world import CLASSES
from atomdiff.training.config import Subject
from atomdiff.utils.articles import fit_article, with_article

AN = "umbrella hour apple honest honor heir onion usher urn owl ice igloo Oracle uncle unimportant egg x-ray"
A = "mug unicorn uniform university European ewe one one-eyed user USB unit utensil UFO utopia ukulele hat herbivore"


@pytest.mark.parametrize(("article", "nouns"), [("an", AN), ("a", A)])
def test_articles_follow_the_sound(article, nouns):
    assert [with_article(noun) for noun in nouns.split()] == [f"{article} {noun}" for noun in nouns.split()]


def test_articles_before_the_class_name_are_made_right_and_others_left():
    prompt = "a photo of a {class_name}, An {class_name}, a bag"
    assert fit_article(prompt, "umbrella") == "a photo of an {class_name}, An {class_name}, a bag"
    assert fit_article(prompt, "mug") == "a photo of a {class_name}, A {class_name}, a bag"


def test_class_prompts_take_the_article_of_their_class():
    assert "umbrella" in CLASSES
    for name, spoken in (("umbrella", "an umbrella"), ("mug", "a mug"), ("hour", "an hour"), ("unicorn", "a unicorn")):
        subject = Subject(instance_data_dir="photos", class_name=name)
        assert subject.fill(subject.class_prompt) == f"a photo of {spoken}"
    assert (
        Subject(instance_data_dir="photos", class_name="umbrella").fill(Subject.instance_prompt)
        == "a photo of sks umbrella"
    )
