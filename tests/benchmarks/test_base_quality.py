"""Frechet distance and sharpness of a base's images."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from benchmarks.base_quality import frechet_distance, relative_frechet_distance, sharpness


def embeddings(count, seed, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    return mean + scale * torch.randn(count, 6, generator=generator) @ mix


def test_the_frechet_distance_is_that_of_the_matrix_root():
    a, b = embeddings(50, 0), embeddings(80, 1, mean=0.5, scale=1.5)
    c, d = (np.cov(each.numpy().astype(float), rowvar=False) for each in (a, b))
    roots = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real  # of the product that is not symmetric
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(c + d) - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_distance_over_that_of_real_halves_is_near_one_for_the_same_distribution():
    real = embeddings(4000, 2)
    assert relative_frechet_distance(embeddings(2000, 3), real)["frechet_over_real"] == pytest.approx(1, rel=0.5)
    assert relative_frechet_distance(embeddings(2000, 3, mean=0.3), real)["frechet_over_real"] > 2
    with pytest.raises(ValueError, match="expected 200 real embeddings, found 4000"):
        relative_frechet_distance(embeddings(100, 3), real)


def test_sharpness_is_the_gradient_in_the_middle():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1)))
    assert sharpness([ramp]) == pytest.approx(3)
    assert sharpness([ramp.rotate(90), ramp]) == pytest.approx(3)
    noise = Image.effect_noise((64, 64), 50)
    assert sharpness([noise.filter(ImageFilter.GaussianBlur(1))]) < 0.6 * sharpness([noise])
    edge = Image.new("L", (64, 64))
    edge.paste(255, (0, 0, 64, 8))
    assert sharpness([edge]) == 0
