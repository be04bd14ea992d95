import numpy as np
import pytest

from atomdiff.toybox.scenes import (
    CLASSES,
    COLORS,
    SCENES,
    Caption,
    base_individual,
    distance,
    draw,
    random_caption,
    shorten,
)
from atomdiff.toybox.shapes import PATTERNS, SUBJECT_COLORS, SUBJECT_PATTERNS
from atomdiff.toybox.subjects import SUBJECTS, random_individual, views
from benchmarks.toybox.data import caption_of, render_individuals, render_one, render_world


def test_the_world_is_as_large_as_promised():
    assert len(CLASSES) >= 12 and len(SCENES) >= 8 and len(COLORS) >= 10 and len(PATTERNS) >= 4
    assert len(SUBJECTS) >= 6


def test_an_image_follows_from_its_seed_alone():
    first, again, other = render_one(3, seed=1), render_one(3, seed=1), render_one(4, seed=1)
    assert first.shape == (64, 64, 3) and np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bulk_drawing_gives_the_same_images_as_drawing_one():
    images, captions = render_world(3, seed=5)
    assert np.array_equal(images[2], render_one(2, seed=5))
    assert captions[2] == caption_of(2, seed=5)[0]


def test_pretraining_and_evaluation_share_no_combination_of_words():
    rng = np.random.default_rng(0)
    seen = {random_caption(rng) for _ in range(500)}
    unseen = {random_caption(rng, held_out=True) for _ in range(200)}
    assert len(unseen) > 100 and not seen & unseen


@pytest.mark.parametrize(
    "caption, text",
    [
        (Caption("mug", "beach", "red", "striped"), "a photo of a red striped mug on the beach"),
        (Caption("car", None, "orange", None), "a photo of an orange car"),
        (Caption("umbrella", "sea"), "a photo of an umbrella under the sea"),
    ],
)
def test_captions_read_as_english(caption, text):
    assert str(caption) == text


def test_shortened_captions_only_lose_words():
    rng = np.random.default_rng(1)
    full = Caption("mug", "beach", "red", "striped")
    short = {shorten(full, rng, keep=0.5) for _ in range(100)}
    assert len(short) == 8 and all(caption.class_name == "mug" for caption in short)


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_shows_its_color_and_its_pattern(class_name):
    def image(color, pattern):
        rng = np.random.default_rng(7)
        individual = base_individual(Caption(class_name, "snow", color, pattern), np.random.default_rng(1))
        return np.asarray(draw(individual, "snow", rng), dtype=float)

    plain = image("red", "plain")
    assert np.abs(plain - image("blue", "plain")).mean() > 4
    for pattern in ("striped", "dotted", "checked"):
        assert np.abs(plain - image("red", pattern)).mean() > 1


def test_subjects_are_unlike_anything_in_the_base_world():
    assert not PATTERNS.keys() & SUBJECT_PATTERNS.keys()
    for subject in SUBJECTS.values():
        assert subject.pattern in SUBJECT_PATTERNS
    for name, rgb in SUBJECT_COLORS.items():
        assert min(distance(rgb, known) for known in COLORS.values()) > 50, name


def test_some_images_to_learn_from_have_colors_without_a_name_and_never_a_subjects():
    captions = [caption_of(index, seed=1) for index in range(300)]
    unnamed = [base_individual(caption, rng) for caption, rng in captions if caption.color is None]
    assert len(unnamed) == 100
    near = [
        distance(color, taken)
        for individual in unnamed
        for color in (individual.first, individual.second)
        for taken in SUBJECT_COLORS.values()
    ]
    assert min(near) > 75 and min(distance(i.first, i.second) for i in unnamed) > 180
    assert all(caption_of(index, seed=1, held_out=True)[0].color for index in range(30))


@pytest.mark.parametrize("pattern", ["striped", "dotted", "checked"])
def test_a_mirrored_pattern_is_nearly_the_same_so_that_its_word_says_where_it_lies(pattern):
    v, u = np.mgrid[0:1:100j, 0:1:100j]
    shown = PATTERNS[pattern](u, v)
    assert (shown == shown[:, ::-1]).mean() > 0.8


def test_the_judges_individuals_are_never_a_shipped_subject():
    rng = np.random.default_rng(0)
    taken = {(subject.class_name, subject.pattern) for subject in SUBJECTS.values()}
    drawn = [random_individual(rng, "mug") for _ in range(200)]
    assert not taken & {(individual.class_name, individual.pattern) for individual in drawn}


def test_views_show_one_individual_in_the_scenes_asked_for():
    images = views(SUBJECTS["mug"], 3, seed=0, scenes=("snow", "space"))
    assert [image.size for image in images] == [(64, 64)] * 3
    brightness = [np.asarray(image).mean() for image in images]
    assert brightness[1] < brightness[0] and brightness[1] < brightness[2]


def test_individuals_are_sorted_by_class_and_keep_their_identity():
    images, identities = render_individuals(13, 2, seed=3)
    assert images.shape == (13, 2, 64, 64, 3)
    assert list(identities[:, 0]) == sorted(identities[:, 0]) and len(set(identities[:, 1])) == 13
