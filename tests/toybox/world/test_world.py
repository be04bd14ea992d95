from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atomdiff.toybox.world import (
    CLASSES,
    COLORS,
    FAMILY_NAMES,
    HARD,
    HELD_OUT_FAMILIES,
    PART_KINDS,
    PATTERNS,
    SCENES,
    SUBJECTS,
    TUNING_SUBJECTS,
    Individuals,
    Views,
    caption_text,
    combination_is_held_out,
    draw_individuals,
    individuals_of,
    is_held_out,
    named_colors,
    render,
    sample_captions,
    sample_individuals,
    sample_views,
    subject_images,
    to_images,
    write_subject_images,
)
from atomdiff.toybox.world.held_out import color_is_held_out
from atomdiff.toybox.world.patterns import FAMILIES, NAMED_FAMILY, Surface, named_ranges

SIZE = 48


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_class(seed: int) -> tuple[Individuals, Views]:
    generator, count = seeded(seed), len(CLASSES)
    individuals = sample_individuals(count, generator, class_index=torch.arange(count))
    return individuals, sample_views(count, generator, scene_index=torch.arange(count) % len(SCENES))


def test_same_seed_gives_same_images_and_another_seed_others():
    first, again, other = (render(*every_class(seed), SIZE) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images) and torch.equal(first.parts, again.parts)
    assert ((first.images - other.images).abs().mean((1, 2, 3)) > 0.02).all()


def test_a_batch_is_its_members_one_by_one():
    individuals, views = every_class(5)
    together = render(individuals, views, SIZE)
    for i in range(len(CLASSES)):
        alone = render(individuals[i], views[i], SIZE)
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-5, rtol=0)
        assert torch.equal(alone.parts[0], together.parts[i])


def test_images_mask_and_parts_agree():
    individuals, views = every_class(6)
    result = render(individuals, views, 64)
    assert result.images.shape == (len(CLASSES), 3, 64, 64) and result.images.isfinite().all()
    assert result.images.min() >= 0 and result.images.max() <= 1
    share = result.mask.mean((1, 2, 3))
    assert (share > 0.06).all() and (share < 0.6).all()
    assert torch.equal(result.parts > 0, result.mask[:, 0] >= 0.5)
    assert result.parts.max() < len(PART_KINDS)
    for name in ("body", "outline"):
        assert ((result.parts == PART_KINDS.index(name)).flatten(1).sum(1) > 20).all(), name


def test_the_mask_is_where_another_pattern_and_color_change_the_image():
    individuals, views = every_class(7)
    recolored = Individuals(
        individuals.class_index, individuals.shape, individuals.family, individuals.pattern, 1 - individuals.colors
    )
    one, other = render(individuals, views, SIZE), render(recolored, views, SIZE)
    changed = (one.images - other.images).abs().amax(1) > 0.02
    assert not (changed & (one.mask[:, 0] == 0)).any()
    body = one.parts == PART_KINDS.index("body")
    assert changed[body].float().mean() > 0.9


@pytest.mark.parametrize("class_name", CLASSES)
def test_shape_parameters_change_the_silhouette(class_name):
    individual = sample_individuals(1, seeded(1), class_index=CLASSES.index(class_name))
    view = sample_views(1, seeded(2), scene_index=0)
    shapes = torch.full((2, individual.shape.shape[1]), 0.1)
    shapes[1] = 0.9
    two = Individuals(*(t.repeat_interleave(2, 0) for t in (individual.class_index,)), shapes, *(
        t.repeat_interleave(2, 0) for t in (individual.family, individual.pattern, individual.colors)
    ))  # fmt: skip
    masks = render(two, view.repeat(2), 64).mask
    assert (masks[0] - masks[1]).abs().sum() / masks[0].sum() > 0.15


def test_every_family_shows_both_colors_and_follows_its_parameters():
    axis = torch.linspace(-0.5, 0.5, 48)
    y, x = torch.meshgrid(axis + 0.5, axis, indexing="ij")
    pixel = torch.full((6, 1, 1), 1 / 48)
    for index, name in enumerate(FAMILY_NAMES):
        parameters = torch.rand(6, 6, generator=seeded(index))
        shares = FAMILIES[name](Surface(x.expand(6, -1, -1), y.expand(6, -1, -1), parameters, pixel))
        assert shares.min() >= 0 and shares.max() <= 1
        if name == "plain":
            assert shares.max() == 0
            continue
        means = shares.mean((1, 2))
        assert (means > 0.04).all() and (means < 0.97).all(), name
        assert (shares[0] - shares[1]).abs().mean() > 0.1, name


def test_nothing_held_out_is_ever_sampled():
    generator = seeded(8)
    captions = sample_captions(1500, generator)
    for individuals in (sample_individuals(1500, generator), individuals_of(captions, generator)):
        assert not is_held_out(individuals).any()
        assert not color_is_held_out(individuals.colors).any()
        families = {FAMILY_NAMES[i] for i in individuals.family.tolist()}
        assert families == set(FAMILY_NAMES) - set(HELD_OUT_FAMILIES)
    assert is_held_out(draw_individuals(1500, generator)).float().mean() > 0.1
    with pytest.raises(ValueError, match="held out"):
        sample_individuals(1, generator, family=FAMILY_NAMES.index("stars"))


def test_subjects_are_held_out_and_so_are_individuals_like_them():
    assert len(SUBJECTS) >= 10 and len(TUNING_SUBJECTS) == 4 and not set(SUBJECTS) & set(TUNING_SUBJECTS)
    assert {FAMILY_NAMES[int(SUBJECTS[name].family)] for name in HARD} <= set(HELD_OUT_FAMILIES) and len(HARD) >= 3
    for name, subject in {**SUBJECTS, **TUNING_SUBJECTS}.items():
        assert len(subject) == 1 and is_held_out(subject).all(), name
        free = draw_individuals(1, seeded(9), subject.class_index, 1)
        alike = Individuals(subject.class_index, subject.shape + 0.05, free.family, free.pattern, free.colors)
        assert is_held_out(alike).all(), name


def test_captions_read_well_and_leave_words_out():
    captions = sample_captions(2000, seeded(10))
    for text, *indices in zip(
        captions.texts,
        *(
            t.tolist()
            for t in (captions.class_index, captions.scene_index, captions.color_index, captions.pattern_index)
        ),
        strict=True,
    ):
        assert text == caption_text(*indices)
        assert min(indices) < 0 or not combination_is_held_out(*indices)
    for index, share in ((captions.scene_index, 0.15), (captions.color_index, 0.40), (captions.pattern_index, 0.45)):
        assert abs((index < 0).float().mean() - share) < 0.04
    assert caption_text(CLASSES.index("umbrella"), 0) == "a photo of an umbrella on the beach"
    words = (CLASSES.index("mug"), 4, list(COLORS).index("orange"), PATTERNS.index("striped"))
    assert caption_text(*words) == "a photo of an orange striped mug in the city"
    held_out = sample_captions(50, seeded(11), held_out=True)
    rows = zip(held_out.class_index, held_out.scene_index, held_out.color_index, held_out.pattern_index, strict=True)
    assert all(combination_is_held_out(*(int(i) for i in row)) for row in rows)


def test_individuals_are_what_their_captions_say():
    generator = seeded(12)
    captions = sample_captions(1000, generator)
    individuals = individuals_of(captions, generator)
    assert torch.equal(individuals.class_index, captions.class_index)
    named = captions.pattern_index >= 0
    assert torch.equal(individuals.family[named], torch.tensor(NAMED_FAMILY)[captions.pattern_index[named]])
    low, high = (bound[captions.pattern_index[named]] for bound in named_ranges())
    assert ((individuals.pattern[named] >= low - 1e-6) & (individuals.pattern[named] <= high + 1e-6)).all()
    colored = captions.color_index >= 0
    gaps = torch.cdist(individuals.colors[colored, 0], named_colors())
    assert torch.equal(gaps.argmin(1), captions.color_index[colored])
    assert len(individuals.family[~named].unique()) == len(FAMILY_NAMES) - len(HELD_OUT_FAMILIES)


def test_batches_are_indexed_joined_and_repeated():
    individuals, views = every_class(13)
    joined = Individuals.cat([individuals[2], individuals[torch.tensor([0, 1])], individuals[-1]])
    assert joined.class_index.tolist() == [2, 0, 1, len(CLASSES) - 1]
    assert individuals[:3].repeat(2).class_index.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(IndexError):
        individuals[len(CLASSES)]
    with pytest.raises(ValueError, match="one view an individual"):
        render(individuals, views[:2])


def test_images_of_a_subject_are_always_the_same_and_the_unseen_ones_are_others():
    name = next(iter(TUNING_SUBJECTS))
    images, scenes = subject_images(name, size=32)
    again, _ = subject_images(name, size=32)
    unseen, unseen_scenes = subject_images(name, unseen=True, size=32)
    assert len(scenes.unique()) == len(images.images) == 5 and len(unseen_scenes.unique()) == len(SCENES)
    assert torch.equal(images.images, again.images)
    assert min((a - b).abs().mean() for a in images.images for b in unseen.images) > 0.01


def test_folders_of_subjects_are_named_like_their_classes(tmp_path):
    for subjects in (SUBJECTS, TUNING_SUBJECTS):
        classes = [CLASSES[int(subject.class_index)] for subject in subjects.values()]
        assert len(set(classes)) == len(classes)
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "09.png").touch()  # of another world
    write_subject_images(tmp_path, {name: SUBJECTS[name] for name in ("zigzag mug", "scaled vase")})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["mug", "vase"]
    photos = sorted((tmp_path / "mug").glob("*.png"))
    assert [file.name for file in photos] == ["01.png", "02.png", "03.png", "04.png", "05.png"]
    assert len(list((tmp_path / "mug" / "unseen").glob("*.png"))) == 16
    written = np.asarray(Image.open(photos[1])) / 255
    expected = subject_images("zigzag mug")[0].images[1].permute(1, 2, 0).numpy()
    assert written.shape == (128, 128, 3) and abs(written - expected).max() < 0.51 / 255


@pytest.mark.parametrize(("folder", "subjects"), [("subjects", SUBJECTS), ("tuning_subjects", TUNING_SUBJECTS)])
def test_the_shipped_images_are_those_that_are_rendered(folder, subjects):
    shipped = Path(__file__).parents[3] / "samples" / folder
    classes = {CLASSES[int(subject.class_index)]: name for name, subject in subjects.items()}
    assert {path.name for path in shipped.iterdir()} == set(classes)
    for class_name, name in classes.items():
        for unseen, place in ((False, shipped / class_name), (True, shipped / class_name / "unseen")):
            images = to_images(subject_images(name, unseen)[0].images)
            files = sorted(place.glob("*.png"))
            assert len(files) == len(images)
            for file, image in zip(files[:1], images, strict=False):  # another processor may round otherwise
                assert np.abs(np.asarray(Image.open(file), int) - np.asarray(image, int)).max() <= 2


def test_no_thing_is_cut_off_by_the_image():
    generator = seeded(14)
    count = 4 * len(CLASSES)
    individuals = sample_individuals(count, generator, class_index=torch.arange(count) % len(CLASSES))
    mask = render(individuals, sample_views(count, generator), 32, supersampling=1).mask[:, 0]
    edges = torch.stack([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]])
    assert (edges < 0.5).all()
