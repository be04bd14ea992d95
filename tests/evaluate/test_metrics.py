"""Fidelity, diversity, prompt match and drift: known values, ranges, invariances, refusals."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atomdiff.evaluate.diversity import vendi_score
from atomdiff.evaluate.drift import pixel_differences
from atomdiff.evaluate.label_accuracy import hits
from atomdiff.evaluate.metrics import as_json, measure, score
from atomdiff.evaluate.similarity import cosines, mean_pairwise_similarity, similarities
from atomdiff.evaluate.suite import Evaluation, GeneratedImages, PromptSuite
from atomdiff.evaluate.table import markdown_table, means_of_kinds

EAST, NORTH, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]


def embeddings(seed, count):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_the_mean_cosine_of_all_pairs():
    assert similarities(torch.tensor([EAST, NORTH]), torch.tensor([EAST])).tolist() == [1, 0]
    found = similarities(torch.tensor([DIAGONAL]), torch.tensor([EAST, NORTH]))
    assert found.tolist() == pytest.approx([math.sqrt(0.5)])


def test_similarity_within_a_set_leaves_out_each_image_with_itself():
    assert mean_pairwise_similarity(torch.tensor([DIAGONAL, DIAGONAL])) == pytest.approx(1)
    assert mean_pairwise_similarity(torch.tensor([EAST, NORTH])) == pytest.approx(0)
    assert mean_pairwise_similarity(torch.tensor([EAST, EAST, NORTH])) == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 6), st.floats(0.01, 100))
def test_lengths_order_and_side_do_not_matter(seed, n, m, factor):
    generated, references = embeddings(seed, n), embeddings(seed + 1, m)
    value = float(similarities(generated, references).mean())
    assert -1 <= value <= 1
    assert float(similarities(factor * references.flip(0), generated).mean()) == pytest.approx(value, abs=1e-6)
    pairs = [float(similarities(generated[[i]], generated[[j]])) for i in range(n) for j in range(n) if i != j]
    assert mean_pairwise_similarity(generated) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)


def test_embeddings_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 5\)"):
        similarities(embeddings(0, 0), embeddings(0, 2))
    with pytest.raises(ValueError, match="sizes 5 and 4"):
        similarities(embeddings(0, 2), embeddings(0, 2)[:, :4])
    with pytest.raises(ValueError, match="n at least 2"):
        mean_pairwise_similarity(embeddings(0, 1))


def test_the_vendi_score_counts_images_that_have_nothing_in_common():
    assert vendi_score(torch.tensor([EAST] * 4)) == pytest.approx(1)
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.tensor([EAST, EAST, NORTH, NORTH])) == pytest.approx(2)
    shares = torch.tensor([0.75, 0.25])  # of the eigenvalues (1 +- 1/2) / 2 of two images at 60 degrees
    expected = math.exp(-sum(share * math.log(share) for share in shares.tolist()))
    assert vendi_score(torch.tensor([EAST, [0.5, math.sqrt(0.75)]])) == pytest.approx(expected, abs=1e-6)


def test_hits_are_counted():
    assert hits(["beach", "forest", "city", "city"], ["beach", "city", "city", "beach"]).tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="1 predicted and 2 expected"):
        hits(["beach"], ["beach", "city"])
    with pytest.raises(ValueError, match="0 predicted"):
        hits([], [])


def gray(value, side=4):
    return Image.new("L", (side, side), value)


def test_drift_is_the_root_mean_square_of_each_pair():
    assert pixel_differences([gray(0)], [gray(255)]).tolist() == [1]
    assert pixel_differences([gray(7), gray(9)], [gray(7), gray(9)]).tolist() == [0, 0]
    assert pixel_differences([gray(0), gray(0)], [gray(51), gray(0)]).tolist() == pytest.approx([0.2, 0])
    half = Image.new("RGB", (4, 4))
    half.paste((255, 255, 255), (0, 0, 2, 4))
    assert float(pixel_differences([Image.new("RGB", (4, 4))], [half])) == pytest.approx(math.sqrt(0.5))


def test_images_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="1 images by the base and 2"):
        pixel_differences([gray(0)], [gray(0), gray(1)])
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(8, 8\)"):
        pixel_differences([gray(0)], [gray(0, 8)])


class Palette:
    """Embeds an image by the direction of its color, and a text by that of the color that it names."""

    colors = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def __init__(self):
        self.count = 0

    def embed(self, images):
        self.count += len(images)
        return torch.tensor([image.convert("RGB").getpixel((0, 0)) for image in images]).float()

    def embed_texts(self, texts):
        return torch.tensor([next(self.colors[word] for word in self.colors if word in text) for text in texts])


RED, GREEN, BLUE = (Image.new("RGB", (4, 4), color) for color in ((200, 0, 0), (0, 150, 0), (0, 0, 90)))


def evaluation(base, concept, prompts=("a red {subject}", "a green {subject}"), references=(RED, RED), **images):
    count = len(concept) // len(prompts)
    suite = PromptSuite("mug", prompts, ("a blue cat",), ("a photo of {subject}",), images_per_prompt=count)
    made = {name: GeneratedImages(found, [BLUE], images.get(name, [])) for name, found in (("b", base), ("c", concept))}
    return Evaluation(suite, Palette(), list(references), made["b"], made["c"])


def test_every_metric_has_its_known_value_on_images_of_plain_colors():
    found = score(evaluation([GREEN, BLUE, GREEN, BLUE], [RED, RED, GREEN, RED], b=[GREEN] * 4, c=[RED] * 4))
    assert found["similarity"] == {"base": 0, "concept": 0.75, "real": 1, "normalized_gain": 0.75}
    assert found["prompt_match"] == {"base": 0.25, "concept": 0.75}  # red, red | green, green are asked for
    assert found["prior_similarity"] == {"base": 0, "concept": 1}
    assert found["diversity"] == {"base": 1, "concept": 0.5}
    assert found["vendi"] == {"base": 2, "concept": 1.5}
    assert found["drift"] == 0 and found["embedding_drift"] == 0 and "scene_accuracy" not in found


@pytest.mark.parametrize(
    "references",
    [
        (RED, RED),  # as the base's images are
        (RED, Image.new("RGB", (4, 4), (200, 1, 0))),
        (RED, GREEN),  # less alike than the base's images are to them
    ],
)
def test_where_the_base_is_as_alike_as_the_photos_there_is_no_gain(references):
    found = measure(evaluation([RED, RED], [RED, GREEN], references=references))
    assert found["similarity"]["normalized_gain"] is None and found["similarity"]["real"] is not None
    means = means_of_kinds({"mug": {"palette": found}, "cat": {"palette": found}}, {"mug": "any", "cat": "any"})
    assert means["all"]["palette"]["similarity"]["normalized_gain"] is None
    table = markdown_table({"mug": {"palette": found}, "cat": {"palette": found}}, means, "palette")
    assert "similarity: real" in table and "normalized gain" not in table


def test_images_in_another_color_than_the_photos_need_not_be_like_them():
    each = evaluation([RED, RED], [RED, GREEN])
    for labels, is_measured in (
        (({"color": "red"}, {"scene": "snow", "pattern": "dotted"}), False),
        (({"color": "red"}, {"scene": "snow"}), True),
        ((), True),
    ):
        suite = replace(each.suite, labels=labels)
        assert (measure(replace(each, suite=suite))["similarity"] is not None) == is_measured


def test_equal_images_differ_by_nothing():
    vectors = torch.rand(500, 5, generator=torch.Generator().manual_seed(0))
    assert cosines(vectors, vectors).max() == 1
    odd = [Image.new("RGB", (4, 4), color) for color in [(11, 14, 7), (44, 17, 28)] * 2]
    same = GeneratedImages(odd, odd)
    suite = PromptSuite("mug", ("a red {subject}",), ("a blue cat",) * 4, images_per_prompt=4)
    found = measure(Evaluation(suite, Palette(), [RED, RED], same, same))
    assert str(found["embedding_drift"]) == "0.000 ± 0.000"


def test_each_image_is_embedded_once():
    each = evaluation([GREEN, BLUE, GREEN, BLUE], [RED, RED, GREEN, RED], b=[GREEN] * 4, c=[RED] * 4)
    score(each)
    assert each.encoder.count == 2 * (4 + 4 + 1) + 2


def test_errors_are_over_prompts_and_of_one_prompt_over_its_images():
    each = measure(evaluation([GREEN] * 4, [RED, RED, GREEN, RED]))["similarity"]["concept"]
    assert (each.mean, each.standard_error, each.count) == (0.75, pytest.approx(0.25), 4)  # of 1 and .5
    one = measure(evaluation([GREEN] * 4, [RED, RED, GREEN, RED], ("a red {subject}",)))["similarity"]["concept"]
    assert (one.mean, one.standard_error) == (0.75, pytest.approx(0.25))  # of 1, 1, 0 and 1
    assert str(one) == "0.750 ± 0.250"


@pytest.mark.parametrize("references", [(RED,), (RED, RED)])
def test_one_image_of_one_prompt_gives_numbers_without_errors(references):
    measured = measure(evaluation([GREEN], [RED], ("a red {subject}",), references))
    assert measured["diversity"] is measured["vendi"] is measured["prior_similarity"] is None
    concept = as_json(measured)["similarity"]["concept"]
    assert concept == {"mean": 1.0, "standard_error": None, "count": 1}
    assert (measured["similarity"]["real"] is None) == (len(references) == 1)
    assert "nan" not in str(as_json(measured)).lower()


def test_values_that_are_not_finite_are_refused():
    black = Image.new("RGB", (4, 4))
    each = evaluation([GREEN], [RED], ("a red {subject}",))
    broken = Evaluation(each.suite, Broken(), each.references, each.base, GeneratedImages([black], [BLUE]))
    with pytest.raises(ValueError, match="not finite"):
        measure(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": []}, "references=[]: expected at least one image of the subject"),
        ({"base": GeneratedImages([GREEN] * 3, [BLUE])}, "base and 4 with the concept; expected 4 of both"),
        ({"concept": GeneratedImages([RED] * 4, [])}, "unrelated: found 1 images by the base and 0 with the concept"),
        (
            {"base": GeneratedImages([], [BLUE]), "concept": GeneratedImages([], [BLUE])},
            "found 0 images by the base and 0 with the concept; expected 4 of both",
        ),
    ],
)
def test_numbers_of_images_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(evaluation([GREEN] * 4, [RED] * 4), **changes)


def test_without_unrelated_prompts_there_is_no_drift():
    each = evaluation([GREEN], [RED], ("a red {subject}",))
    base, concept = (GeneratedImages([image], []) for image in (GREEN, RED))
    bare = Evaluation(each.suite, each.encoder, each.references, base, concept)
    assert measure(bare)["drift"] is measure(bare)["embedding_drift"] is None


class Namer(Palette):
    """Recognizes colors."""

    def recognize(self, images, labels):
        return [list(self.colors)[image.getpixel((0, 0)).index(max(image.getpixel((0, 0))))] for image in images]


def test_labels_are_looked_for_in_the_images_whose_prompts_have_them():
    each = evaluation([RED, RED, BLUE, BLUE], [RED, BLUE, BLUE, BLUE])
    suite = PromptSuite("mug", each.suite.prompts, (), labels=({"color": "red"}, {"scene": ""}), images_per_prompt=2)
    found = score(Evaluation(suite, Namer(), each.references, each.base, each.concept))
    assert found["color_accuracy"] == {"base": 1, "concept": 0.5} and "scene_accuracy" not in found


class Broken(Palette):
    def embed(self, images):
        return super().embed(images) / 0
