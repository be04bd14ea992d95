"""Fidelity, diversity, prompt match and drift: known values, ranges, invariances, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atomdiff.evaluate.drift import mean_pixel_difference
from atomdiff.evaluate.scene_accuracy import accuracy
from atomdiff.evaluate.similarity import mean_pairwise_similarity, mean_similarity

EAST, NORTH, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]


def embeddings(seed, count):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_the_mean_cosine_of_all_pairs():
    assert mean_similarity(torch.tensor([EAST, NORTH]), torch.tensor([EAST])) == pytest.approx(0.5)
    assert mean_similarity(torch.tensor([DIAGONAL]), torch.tensor([EAST, NORTH])) == pytest.approx(math.sqrt(0.5))


def test_similarity_within_a_set_leaves_out_each_image_with_itself():
    assert mean_pairwise_similarity(torch.tensor([DIAGONAL, DIAGONAL])) == pytest.approx(1)
    assert mean_pairwise_similarity(torch.tensor([EAST, NORTH])) == pytest.approx(0)
    assert mean_pairwise_similarity(torch.tensor([EAST, EAST, NORTH])) == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 6), st.floats(0.01, 100))
def test_lengths_order_and_side_do_not_matter(seed, n, m, factor):
    generated, references = embeddings(seed, n), embeddings(seed + 1, m)
    value = mean_similarity(generated, references)
    assert -1 <= value <= 1
    assert mean_similarity(factor * references.flip(0), generated) == pytest.approx(value, abs=1e-6)
    pairs = [mean_similarity(generated[[i]], generated[[j]]) for i in range(n) for j in range(n) if i != j]
    assert mean_pairwise_similarity(generated) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)


def test_embeddings_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 5\)"):
        mean_similarity(embeddings(0, 0), embeddings(0, 2))
    with pytest.raises(ValueError, match="sizes 5 and 4"):
        mean_similarity(embeddings(0, 2), embeddings(0, 2)[:, :4])
    with pytest.raises(ValueError, match="n at least 2"):
        mean_pairwise_similarity(embeddings(0, 1))


def test_accuracy_is_a_share():
    assert accuracy(["beach", "forest", "city", "city"], ["beach", "city", "city", "beach"]) == 0.5
    with pytest.raises(ValueError, match="1 predicted and 2 expected"):
        accuracy(["beach"], ["beach", "city"])
    with pytest.raises(ValueError, match="0 predicted"):
        accuracy([], [])


def gray(value, side=4):
    return Image.new("L", (side, side), value)


def test_drift_is_the_mean_of_root_mean_squares():
    assert mean_pixel_difference([gray(0)], [gray(255)]) == 1
    assert mean_pixel_difference([gray(7), gray(9)], [gray(7), gray(9)]) == 0
    assert mean_pixel_difference([gray(0), gray(0)], [gray(51), gray(0)]) == pytest.approx(0.1)
    half = Image.new("RGB", (4, 4))
    half.paste((255, 255, 255), (0, 0, 2, 4))
    assert mean_pixel_difference([Image.new("RGB", (4, 4))], [half]) == pytest.approx(math.sqrt(0.5))


def test_images_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="1 images by the base and 2"):
        mean_pixel_difference([gray(0)], [gray(0), gray(1)])
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(8, 8\)"):
        mean_pixel_difference([gray(0)], [gray(0, 8)])
