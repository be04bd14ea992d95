"""The mathematics: atoms, and what their changes do to a weight; every variant in full is in `test_oracle.py`."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.atoms.layout import View
from atomdiff.atoms.update import (
    Change,
    adapt_weight,
    adapt_weight_by_row,
    dct_atoms,
    gram,
    multiply_by_row,
    singular_values,
    svd_atoms,
    update_matrix,
    write_adapted,
)


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


def changes_of(kind, weight):
    """Every variant of a change, for a weight of 8 x 8 channels or more."""
    n, inputs = math.prod(weight.shape[2:]), weight.shape[1]
    spatial = Change(View(), random(n, n, seed=1).float() / 8)
    channel = Change(View((4, 4), whole=False), random(16, 16, seed=2).float() / 8)
    joint = Change(View((2, 4)), random(8 * n, 8 * n, seed=3).float() / 16)
    recursive = Change(View(), random(inputs, n, n, seed=4).float() / 8)
    codes = random(8 * inputs, 12, seed=5).float() / 8
    coded = Change(View(), random(12, n, seed=6).float() / 8, View().code_columns(codes, weight.shape))
    by_input = View().code_columns(codes, weight.shape, by_input=True)
    recursive_code = Change(View(), random(inputs, 12, n, seed=7).float() / 8, by_input)
    blocks = View((4, 2), whole=False)
    coded_blocks = Change(blocks, random(5, 8, seed=9).float() / 8, code_of(blocks, weight, 5))
    return {
        "none": [],
        "spatial": [spatial],
        "two spatial": [spatial, Change(View(), random(n, n, seed=8).float() / 8)],
        "channel": [channel],
        "separable": [channel, spatial],
        "joint": [joint],
        "recursive": [recursive],
        "sparse": [coded],
        "sparse by input": [recursive_code],
        "sparse blocks": [coded_blocks],
        "all": [spatial, coded, channel, recursive, joint, coded_blocks, recursive_code],
    }[kind]


def code_of(view, weight, num_atoms):
    blocks = weight.numel() // math.prod(view.block)
    return view.code_columns(random(blocks, num_atoms, seed=10).float() / 8, weight.shape)


KINDS = "none,spatial,two spatial,channel,separable,joint,recursive,sparse,sparse by input,sparse blocks,all".split(",")
LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels last": lambda weight: weight.to(memory_format=torch.channels_last),
    "a part of another": lambda weight: torch.cat([weight, weight], 1)[:, : weight.shape[1]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_writing_gives_what_adapting_gives(monkeypatch, kind, layout, dtype):
    for shape, numbers in (((8, 8, 3, 3), 1 << 20), ((8, 12, 3, 1), 100), ((8, 8, 1, 1), 1), ((8, 8, 3, 3), 300)):
        monkeypatch.setattr("atomdiff.atoms.update._NUMBERS_AT_ONCE", numbers)
        weight = LAYOUTS[layout](random(*shape).to(dtype))
        changes, before = changes_of(kind, weight), weight.clone()
        exact = adapt_weight(weight.double(), changes)
        for goal in LAYOUTS.values():  # also where the base comes from a file, in another layout than the weight
            out = goal(torch.full(shape, math.nan, dtype=dtype))
            where, strides = out.data_ptr(), out.stride()
            write_adapted(out, weight, changes)
            assert torch.equal(weight, before) and (out.data_ptr(), out.stride()) == (where, strides)
            eps = torch.finfo(dtype).eps  # in half precision the small matrix may be rounded, too
            error = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * eps)
            torch.testing.assert_close(out.double(), exact, rtol=eps, atol=error)
        assert kind == "none" or (exact - before.double()).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_zero_matrices_changes_no_value(dtype, layout):
    weight = LAYOUTS[layout](random(8, 8, 3, 3).to(dtype))
    for kind in KINDS[1:]:
        out = torch.empty_like(weight)
        zero = [Change(c.view, torch.zeros_like(c.matrix), c.codes) for c in changes_of(kind, weight)]
        write_adapted(out, weight, zero)
        assert torch.equal(out, weight), kind


def test_a_linear_weight_and_one_that_is_no_multiple_of_a_part_are_written(monkeypatch):
    monkeypatch.setattr("atomdiff.atoms.update._NUMBERS_AT_ONCE", 70)
    weight, channel = random(12, 8).float(), random(6, 6, seed=1).float()
    for changes in (
        [Change(View((3, 2), whole=False), channel)],
        [Change(View((3, 2), whole=False), channel), Change(View((4, 1), whole=False), random(4, 4, seed=2).float())],
        [Change(View(), torch.tensor([[0.5]]))],
    ):
        out = torch.empty_like(weight)
        write_adapted(out, weight, changes)
        torch.testing.assert_close(out, adapt_weight(weight, changes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_of_a_batch_get_what_each_would_get_alone(kind, dtype, layout):
    weight = LAYOUTS[layout](random(8, 8, 3, 3).to(dtype))
    changes, factors = changes_of(kind, weight), torch.tensor([0.0, 1.0, -0.5, 2.0])
    by_row = [
        Change(c.view, factors.roll(place).view(-1, *[1] * c.matrix.ndim) * c.matrix, c.codes)
        for place, c in enumerate(changes)
    ]
    rows = adapt_weight_by_row(weight, by_row)
    assert rows.shape == (4, *weight.shape) and rows.dtype == dtype
    for place, row in enumerate(rows):
        alone = adapt_weight(weight, [Change(c.view, c.matrix[place], c.codes) for c in by_row])
        torch.testing.assert_close(row, alone, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if len(changes) == 1:
        assert torch.equal(rows[0], weight) and not torch.equal(rows[1], rows[3])


@pytest.mark.parametrize("block", [(4, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graded", [False, True])
def test_products_by_row_are_those_of_the_weights_by_row(block, dtype, graded, monkeypatch):
    weight, size = random(20, 12, 3, 1).to(dtype), math.prod(block)
    view, columns = View(block, whole=False), random(2, 12 * 3, 7, seed=1).to(dtype)
    changes = [Change(view, random(2, size, size, seed=seed).float() / 8) for seed in (2, 3)]
    expected = adapt_weight_by_row(weight.double(), changes).flatten(2) @ columns.double()
    gathered = rearrange(columns, "r (i q n) w -> r q (i n) w", q=block[1], n=3)
    for numbers in (1, 2000, 1 << 20):
        monkeypatch.setattr("atomdiff.atoms.update._BYTES_AT_ONCE", numbers)
        with torch.set_grad_enabled(graded):
            product = multiply_by_row(weight, changes, gathered)
        assert product.dtype == dtype
        error = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.01)
        assert (product.double() - expected).norm() < error * expected.norm()


def test_rows_without_any_change_are_the_callers_business():
    with pytest.raises(ValueError, match="use the weight itself"):
        adapt_weight_by_row(torch.zeros(4, 4), [])
