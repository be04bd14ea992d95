"""Blocks are read in the order that the concept file documents."""

import pytest
import torch

from atomdiff.atoms.layout import View, as_kernels, fit_block


def test_rows_of_kernels_are_the_kernels_in_order():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    rows = View().rows(weight)
    assert rows.shape == (6, 4)
    assert torch.equal(rows[4], weight[1, 1].flatten())


def test_rows_of_channels_hold_one_block_at_one_kernel_position():
    weight = torch.arange(4 * 6 * 2 * 3).reshape(4, 6, 2, 3)
    rows = View((2, 3), spans_kernel=False).rows(weight)  # 2 x 2 blocks, 6 positions
    assert rows.shape == (2 * 2 * 6, 6)
    second_block_position_5 = weight[0:2, 3:6, 1, 2].flatten()
    assert torch.equal(rows[1 * 6 + 5], second_block_position_5)


def test_rows_of_whole_blocks_run_over_channels_first():
    weight = torch.arange(4 * 6 * 2 * 3).reshape(4, 6, 2, 3)
    rows = View((2, 3)).rows(weight)
    assert rows.shape == (4, 36)
    assert torch.equal(rows[1], weight[0:2, 3:6].flatten())


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 2, 3), (4, 6, 2, 1, 3)])
def test_every_kernel_has_one_axis(shape):
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert torch.equal(as_kernels(weight)[1, 2], weight[1, 2].flatten())
    assert View((2, 2)).axes(shape) == (2, 2, *shape[2:]) and View((2, 2), spans_kernel=False).axes(shape) == (2, 2)


@pytest.mark.parametrize(
    "view",
    [View(), View(by_input=True), View((2, 3)), View((2, 3), by_input=True), View((2, 3), spans_kernel=False)],
)
def test_columns_are_the_rows_and_go_back(view):
    weight = torch.arange(4 * 6 * 5).reshape(4, 6, 5)
    columns = view.columns(weight)
    assert torch.equal(view.from_columns(columns, 5), weight)
    assert torch.equal(view.coefficient_columns(view.rows(weight), weight.shape), columns)
    assert torch.equal(view.coefficient_rows(columns, weight.shape), view.rows(weight))
    assert torch.equal(view.coefficient_rows(columns, weight.shape), view.rows(weight))


@pytest.mark.parametrize(
    ("shape", "wanted", "block"),
    [
        ((8, 8, 3, 3), 4, (4, 4)),
        ((8, 3, 3, 3), 4, (4, 1)),
        ((10, 8), 4, (1, 4)),
        ((7, 5), 2, (1, 1)),
        ((8, 1), 8, (8, 1)),
    ],
)
def test_a_side_that_the_block_does_not_divide_gets_one(shape, wanted, block):
    assert fit_block(shape, wanted) == block
