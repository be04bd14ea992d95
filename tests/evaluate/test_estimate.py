import math

import pytest
import torch

from atomdiff.evaluate.estimate import estimate


def test_the_error_is_that_of_the_means_of_prompts():
    values = torch.tensor([[0.0, 2.0], [4.0, 6.0], [2.0, 4.0]])  # means 1, 5, 3
    found = estimate(values)
    assert (found.mean, found.count) == (3, 6) and found.standard_error == pytest.approx(2 / math.sqrt(3))


def test_one_prompt_has_the_error_of_its_images_and_one_image_has_none():
    assert estimate(torch.tensor([[1.0, 2.0, 3.0]])).standard_error == pytest.approx(1 / math.sqrt(3))
    assert estimate(torch.tensor([[1.5]])).standard_error is None and str(estimate(torch.tensor([[1.5]]))) == "1.500"


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(0, 4)])
def test_what_is_no_table_of_values_is_refused(values):
    with pytest.raises(ValueError, match=r"expected \(prompts, images\)"):
        estimate(values)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="2 values that are not finite"):
        estimate(torch.tensor([[math.nan, 1.0], [math.inf, 0.0]]))
