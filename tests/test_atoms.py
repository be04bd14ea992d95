"""The mathematics against plain loops and the paper's own form."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.atoms import (
    adapt_weight,
    dct_atoms,
    gram,
    singular_values,
    sum_channel_matrices,
    svd_atoms,
    update_matrix,
)
from atomdiff.blocks import as_kernels, kernel_rows


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block_by_block(weight, spatial, channel, block):
    """(I + C).T @ B @ (I + S) for each block B (p * q, k * l), one after the other."""
    (p, q), kernels = block, as_kernels(weight)
    out, width, k, el = kernels.shape
    changed = torch.empty_like(kernels)
    left = (torch.eye(p * q, dtype=weight.dtype) + channel).T
    right = torch.eye(k * el, dtype=weight.dtype) + spatial
    for o, i in itertools.product(range(0, out, p), range(0, width, q)):
        matrix = kernels[o : o + p, i : i + q].reshape(p * q, k * el)
        changed[o : o + p, i : i + q] = (left @ matrix @ right).reshape(p, q, k, el)
    return changed.reshape(weight.shape)


SHAPES = [
    ((4, 6, 3, 3), (2, 3)),
    ((6, 4, 3, 1), (3, 2)),
    ((8, 1, 5, 5), (4, 1)),
    ((4, 4, 1, 1), (2, 2)),
    ((6, 9), (2, 3)),
]


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_adapted_weight_is_the_separable_formula(shape, block, channels_last):
    weight = random(*shape)
    if channels_last and len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    size, kernel = math.prod(block), math.prod(shape[2:])
    spatial, channel = random(kernel, kernel, seed=1), random(size, size, seed=2)
    adapted = adapt_weight(weight, spatial, channel, block)
    torch.testing.assert_close(adapted, block_by_block(weight, spatial, channel, block), rtol=1e-12, atol=1e-12)
    assert adapted.stride() == weight.stride()


def test_update_matrix_is_the_papers_update():
    weight = random(5, 4, 3, 3)
    rows, delta = kernel_rows(weight), random(6, 9, seed=1)
    atoms = svd_atoms(rows, 6).double()
    coefficients = rows @ atoms.T  # A = X @ D.T
    papers = rows + coefficients @ delta  # X' = X + A @ dD
    ours = kernel_rows(adapt_weight(weight, update_matrix(atoms, delta)))
    torch.testing.assert_close(ours, papers, rtol=1e-12, atol=1e-12)


def test_update_matrix_times_its_scale():
    atoms, delta = dct_atoms((3, 3), 9), random(9, 9, dtype=torch.float32)
    torch.testing.assert_close(update_matrix(atoms, delta, 0.5), 0.5 * atoms.T @ delta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_zero_matrices_change_no_bit(dtype, channels_last):
    weight = random(8, 4, 3, 3).to(dtype)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    adapted = adapt_weight(weight, torch.zeros(9, 9), torch.zeros(16, 16), (4, 4))
    assert torch.equal(adapted, weight) and adapted.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype):
    weight, spatial = random(8, 4, 3, 3).to(dtype), random(9, 9, seed=1).float() / 10
    exact = block_by_block(weight.double(), spatial.double(), torch.zeros(1, 1, dtype=torch.float64), (1, 1))
    adapted = adapt_weight(weight, spatial).double()
    unit = torch.finfo(dtype).eps / 2
    assert ((adapted - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()


def test_gradients_are_right():
    weight = random(4, 4, 2, 2)
    spatial, channel = random(4, 4, seed=1).requires_grad_(), random(4, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, c: adapt_weight(weight, s, c, (2, 2)), (spatial, channel))


@given(st.sampled_from([(2, 2), (1, 2), (4, 2)]), st.sampled_from([(2, 2), (2, 1), (4, 4), (1, 1)]))
@settings(max_examples=12, deadline=None)
def test_channel_matrices_of_several_blocks_add_up_as_updates(first, second):
    weight = random(8, 8, 3, 1)
    one, other = (
        random(math.prod(first), math.prod(first), seed=1),
        random(math.prod(second), math.prod(second), seed=2),
    )
    block, total = sum_channel_matrices([(first, one), (second, other)])
    together = adapt_weight(weight, channel=total, block=block)
    apart = adapt_weight(weight, channel=one, block=first) + adapt_weight(weight, channel=other, block=second) - weight
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
