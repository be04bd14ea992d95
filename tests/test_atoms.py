"""The mathematics: atoms, and what their changes do to a weight; every variant in full is in `test_oracle.py`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.atoms import Change, adapt_weight, dct_atoms, gram, singular_values, svd_atoms, update_matrix
from atomdiff.blocks import View


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapt_separably(weight, spatial, channel, block):
    return adapt_weight(weight, [Change(View(), spatial), Change(View(block, whole=False), channel)])


def test_update_matrix_is_the_papers_update():
    weight = random(5, 4, 3, 3)
    rows, delta = View().rows(weight), random(6, 9, seed=1)
    atoms = svd_atoms(rows, 6).double()
    coefficients = rows @ atoms.T  # A = X @ D.T
    papers = rows + coefficients @ delta  # X' = X + A @ dD
    ours = View().rows(adapt_weight(weight, [Change(View(), update_matrix(atoms, delta))]))
    torch.testing.assert_close(ours, papers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_zero_matrices_change_no_bit(dtype, channels_last):
    weight = random(8, 4, 3, 3).to(dtype)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    adapted = adapt_separably(weight, torch.zeros(9, 9), torch.zeros(16, 16), (4, 4))
    assert torch.equal(adapted, weight) and adapted.dtype == dtype and adapted.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype):
    weight, spatial = random(8, 4, 3, 3).to(dtype), random(9, 9, seed=1).float() / 10
    exact = View().rows(weight.double()) @ (torch.eye(9) + spatial).double()
    adapted = View().rows(adapt_weight(weight, [Change(View(), spatial)])).double()
    unit = torch.finfo(dtype).eps / 2
    assert ((adapted - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("block", [(2, 2), (1, 1)])
def test_concepts_of_one_view_add_up_before_they_touch_the_weight(block):
    weight, one, other = random(4, 4, 2, 2), random(16, 16, seed=1), random(16, 16, seed=2)
    one, other = (matrix[: 4 * math.prod(block), : 4 * math.prod(block)] for matrix in (one, other))
    together = adapt_weight(weight, [Change(View(block), one), Change(View(block), other)])
    torch.testing.assert_close(together, adapt_weight(weight, [Change(View(block), one + other)]))


@given(st.sampled_from([(2, 2), (1, 2), (4, 2)]), st.sampled_from([(2, 2), (2, 1), (4, 4), (1, 1)]), st.booleans())
@settings(max_examples=16, deadline=None)
def test_concepts_of_several_views_add_up_as_updates(first, second, whole):
    weight = random(8, 8, 3, 1)
    positions = 3 if whole else 1
    sizes = math.prod(first) * positions, math.prod(second) * positions
    one = Change(View(first, whole), random(sizes[0], sizes[0], seed=1))
    other = Change(View(second, whole), random(sizes[1], sizes[1], seed=2))
    together = adapt_weight(weight, [one, other])
    apart = adapt_weight(weight, [one]) + adapt_weight(weight, [other]) - weight
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_atoms", [1, 5, 9])
def test_svd_atoms_are_the_leading_right_singular_vectors(num_atoms):
    rows = random(50, 9) * torch.arange(1, 10)
    atoms = svd_atoms(rows, num_atoms).double()
    expected = torch.linalg.svd(rows)[2][:num_atoms]
    torch.testing.assert_close((atoms @ expected.T).abs(), torch.eye(num_atoms, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (atoms.gather(1, atoms.abs().argmax(1, keepdim=True)) > 0).all()


def test_svd_atoms_are_the_same_every_time_and_for_flipped_weights():
    rows = random(200, 9).float()
    assert torch.equal(svd_atoms(rows, 9), svd_atoms(rows.clone(), 9))
    assert torch.equal(svd_atoms(rows, 9), svd_atoms(-rows, 9))


def test_singular_values_come_in_descending_order():
    rows = random(30, 4)
    torch.testing.assert_close(singular_values(rows), torch.linalg.svdvals(rows))
    assert torch.equal(gram(rows), rows.T @ rows)
    many = random(100_000, 3)
    torch.testing.assert_close(gram(many), many.T @ many)


def test_dct_atoms_are_orthonormal_and_ordered_by_frequency():
    atoms = dct_atoms((2, 3, 4), 24).double()
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(24, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(atoms[0], torch.full((24,), 24**-0.5, dtype=torch.float64))
    # Atom 1 has the lowest frequency along the last axis only: cos(pi (x + 1/2) / 4) on each of the 6 rows.
    wave = [math.cos(math.pi * (x + 0.5) / 4) for x in range(4)]
    expected = torch.tensor(wave * 6, dtype=torch.float64)
    torch.testing.assert_close(atoms[1], expected / expected.norm(), atol=1e-6, rtol=0)
    assert torch.equal(dct_atoms((2, 3, 4), 5), dct_atoms((2, 3, 4), 24)[:5])


@pytest.mark.parametrize("num_atoms", [0, 10])
def test_impossible_numbers_of_atoms_are_refused(num_atoms):
    with pytest.raises(ValueError, match=f"num_atoms={num_atoms}.*1 to 9"):
        svd_atoms(random(20, 9), num_atoms)
    with pytest.raises(ValueError, match="1 to 9"):
        dct_atoms((3, 3), num_atoms)


def test_atoms_of_broken_weights_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        svd_atoms(torch.tensor([[1.0, float("nan")]]), 1)
