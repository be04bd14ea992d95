"""Writing the adapted weight, one for all or one a sample, against the equation as `updated_weight` says it."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.atoms.batched import adapt_in_turn, adapt_weight_per_sample, can_adapt_in_turn, multiply_per_sample
from atomdiff.atoms.layout import View
from atomdiff.atoms.merge import adapt_weight, write_adapted
from atomdiff.atoms.update import WeightUpdate, updated_weight


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapt_separably(weight, spatial, channel, block):
    return adapt_weight(weight, [WeightUpdate(View(), spatial), WeightUpdate(View(block, spans_kernel=False), channel)])


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
    adapted = View().rows(adapt_weight(weight, [WeightUpdate(View(), spatial)])).double()
    unit = torch.finfo(dtype).eps / 2
    assert ((adapted - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("block", [(2, 2), (1, 1)])
def test_concepts_of_one_view_add_up_before_they_touch_the_weight(block):
    weight, one, other = random(4, 4, 2, 2), random(16, 16, seed=1), random(16, 16, seed=2)
    one, other = (matrix[: 4 * math.prod(block), : 4 * math.prod(block)] for matrix in (one, other))
    together = adapt_weight(weight, [WeightUpdate(View(block), one), WeightUpdate(View(block), other)])
    torch.testing.assert_close(together, adapt_weight(weight, [WeightUpdate(View(block), one + other)]))


@given(st.sampled_from([(2, 2), (1, 2), (4, 2)]), st.sampled_from([(2, 2), (2, 1), (4, 4), (1, 1)]), st.booleans())
@settings(max_examples=16, deadline=None)
def test_concepts_of_several_views_add_up_as_updates(first, second, spans_kernel):
    weight = random(8, 8, 3, 1)
    positions = 3 if spans_kernel else 1
    sizes = math.prod(first) * positions, math.prod(second) * positions
    one = WeightUpdate(View(first, spans_kernel), random(sizes[0], sizes[0], seed=1))
    other = WeightUpdate(View(second, spans_kernel), random(sizes[1], sizes[1], seed=2))
    together = adapt_weight(weight, [one, other])
    apart = adapt_weight(weight, [one]) + adapt_weight(weight, [other]) - weight
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def updates_of(kind, weight):
    """Every variant of a change, for a weight of 8 x 8 channels or more."""
    n, inputs = math.prod(weight.shape[2:]), weight.shape[1]
    spatial = WeightUpdate(View(), random(n, n, seed=1).float() / 8)
    channel = WeightUpdate(View((4, 4), spans_kernel=False), random(16, 16, seed=2).float() / 8)
    joint = WeightUpdate(View((2, 4)), random(8 * n, 8 * n, seed=3).float() / 16)
    recursive = WeightUpdate(View(by_input=True), random(inputs, n, n, seed=4).float() / 8)
    coefficients = random(8 * inputs, 12, seed=5).float() / 8
    sparse = WeightUpdate(
        View(), random(12, n, seed=6).float() / 8, View().coefficient_columns(coefficients, weight.shape)
    )
    by_input = View(by_input=True)
    recursive_sparse = WeightUpdate(
        by_input,
        random(inputs, 12, n, seed=7).float() / 8,
        by_input.coefficient_columns(coefficients, weight.shape),
    )
    blocks = View((4, 2), spans_kernel=False)
    sparse_blocks = WeightUpdate(blocks, random(5, 8, seed=9).float() / 8, random_coefficients(blocks, weight, 5))
    return {
        "none": [],
        "spatial": [spatial],
        "two spatial": [spatial, WeightUpdate(View(), random(n, n, seed=8).float() / 8)],
        "channel": [channel],
        "separable": [channel, spatial],
        "joint": [joint],
        "recursive": [recursive],
        "sparse": [sparse],
        "sparse by input": [recursive_sparse],
        "sparse blocks": [sparse_blocks],
        "all": [spatial, sparse, channel, recursive, joint, sparse_blocks, recursive_sparse],
    }[kind]


def random_coefficients(view, weight, num_atoms):
    blocks = weight.numel() // math.prod(view.block)
    return view.coefficient_columns(random(blocks, num_atoms, seed=10).float() / 8, weight.shape)


def wide(updates):
    """The same in float64."""
    coefficients = [None if u.coefficients is None else u.coefficients.double() for u in updates]
    return [WeightUpdate(u.view, u.matrix.double(), c) for u, c in zip(updates, coefficients, strict=True)]


KINDS = "none,spatial,two spatial,channel,separable,joint,recursive,sparse,sparse by input,sparse blocks,all".split(",")
LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels last": lambda weight: weight.to(memory_format=torch.channels_last),
    "a part of another": lambda weight: torch.cat([weight, weight], 1)[:, : weight.shape[1]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapting_gives_what_the_equation_says(kind):
    weight = random(8, 8, 3, 3)
    updates = wide(updates_of(kind, weight))
    torch.testing.assert_close(adapt_weight(weight, updates), updated_weight(weight, updates), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_writing_gives_what_the_equation_says(monkeypatch, kind, layout, dtype):
    for shape, numbers in (((8, 8, 3, 3), 1 << 20), ((8, 12, 3, 1), 100), ((8, 8, 1, 1), 1), ((8, 8, 3, 3), 300)):
        monkeypatch.setattr("atomdiff.atoms.merge._CPU_PART", numbers)
        weight = LAYOUTS[layout](random(*shape).to(dtype))
        updates, before = updates_of(kind, weight), weight.clone()
        updates = wide(updates) if dtype == torch.float64 else updates
        exact = updated_weight(weight.double(), wide(updates))
        for goal in LAYOUTS.values():  # also where the base comes from a file, in another layout than the weight
            out = goal(torch.full(shape, math.nan, dtype=dtype))
            where, strides = out.data_ptr(), out.stride()
            write_adapted(out, weight, updates)
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
        zero = [WeightUpdate(c.view, torch.zeros_like(c.matrix), c.coefficients) for c in updates_of(kind, weight)]
        write_adapted(out, weight, zero)
        assert torch.equal(out, weight), kind


def test_a_linear_weight_and_one_that_is_no_multiple_of_a_part_are_written(monkeypatch):
    monkeypatch.setattr("atomdiff.atoms.merge._CPU_PART", 70)
    weight, channel = random(12, 8).float(), random(6, 6, seed=1).float()
    for updates in (
        [WeightUpdate(View((3, 2), spans_kernel=False), channel)],
        [
            WeightUpdate(View((3, 2), spans_kernel=False), channel),
            WeightUpdate(View((4, 1), spans_kernel=False), random(4, 4, seed=2).float()),
        ],
        [WeightUpdate(View(), torch.tensor([[0.5]]))],
    ):
        out = torch.empty_like(weight)
        write_adapted(out, weight, updates)
        torch.testing.assert_close(out, updated_weight(weight, updates), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_of_a_batch_get_what_each_would_get_alone(kind, dtype, layout):
    weight = LAYOUTS[layout](random(8, 8, 3, 3).to(dtype))
    updates, factors = updates_of(kind, weight), torch.tensor([0.0, 1.0, -0.5, 2.0])
    per_sample = [
        WeightUpdate(c.view, factors.roll(index).view(-1, *[1] * c.matrix.ndim) * c.matrix, c.coefficients)
        for index, c in enumerate(updates)
    ]
    weights = adapt_weight_per_sample(weight, per_sample)
    assert weights.shape == (4, *weight.shape) and weights.dtype == dtype
    for index, adapted in enumerate(weights):
        of_sample = [WeightUpdate(u.view, u.matrix[index], u.coefficients) for u in per_sample]
        alone = updated_weight(weight.double(), wide(of_sample))
        torch.testing.assert_close(adapted.double(), alone, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if len(updates) == 1:
        assert torch.equal(weights[0], weight) and not torch.equal(weights[1], weights[3])
    assert not can_adapt_in_turn(weight, per_sample)  # gradients are on
    with torch.no_grad():
        in_turn = can_adapt_in_turn(weight, per_sample)
        of_channels = ("channel", "separable") if dtype not in (torch.float16, torch.bfloat16) else ()
        assert in_turn == (kind in ("spatial", "two spatial", *of_channels) and weight.is_contiguous())
        if in_turn:
            ours = torch.stack([adapted.clone() for adapted in adapt_in_turn(weight, per_sample)])
            assert (ours - weights).double().norm() < 2 * torch.finfo(dtype).eps * weights.double().norm()


@pytest.mark.parametrize("block", [(4, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graded", [False, True])
def test_products_per_sample_are_those_of_the_equation(block, dtype, graded, monkeypatch):
    weight, size = random(20, 12, 3, 1).to(dtype), math.prod(block)
    view, columns = View(block, spans_kernel=False), random(2, 12 * 3, 7, seed=1).to(dtype)
    matrix = random(2, size, size, seed=2) / 8
    update = WeightUpdate(view, matrix if dtype == torch.float64 else matrix.float())
    of_samples = [WeightUpdate(view, matrix.double()) for matrix in update.matrix]
    weights = torch.stack([updated_weight(weight.double(), [each]) for each in of_samples])
    expected = weights.flatten(2) @ columns.double()
    rows = rearrange(columns, "r (i q n) w -> r q w (n i)", q=block[1], n=3)
    for numbers in (1, 2000, 1 << 20):
        monkeypatch.setattr("atomdiff.atoms.batched._PART_BYTES", numbers)
        with torch.set_grad_enabled(graded):
            product = multiply_per_sample(weight, update, rows).mT
        assert product.dtype == dtype
        error = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.01)
        assert (product.double() - expected).norm() < error * expected.norm()


def test_samples_without_any_update_are_the_callers_business():
    with pytest.raises(ValueError, match="use the weight itself"):
        adapt_weight_per_sample(torch.zeros(4, 4), [])
