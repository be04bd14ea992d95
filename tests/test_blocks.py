"""Blocks are read in the order that the delta file documents."""

import pytest
import torch

from atomdiff.blocks import as_kernels, channel_rows, fit_block, kernel_rows


def test_kernel_rows_are_the_kernels_in_order():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    rows = kernel_rows(weight)
    assert rows.shape == (6, 4)
    assert torch.equal(rows[4], weight[1, 1].flatten())


def test_channel_rows_hold_one_block_at_one_kernel_position():
    weight = torch.arange(4 * 6 * 2 * 3).reshape(4, 6, 2, 3)
    rows = channel_rows(weight, (2, 3))  # 2 x 2 blocks, 6 positions
    assert rows.shape == (2 * 2 * 6, 6)
    second_block_position_5 = weight[0:2, 3:6, 1, 2].flatten()
    assert torch.equal(rows[1 * 6 + 5], second_block_position_5)


def test_linear_weights_have_a_kernel_of_one():
    weight = torch.arange(24).reshape(4, 6)
    assert as_kernels(weight).shape == (4, 6, 1, 1)
    assert torch.equal(channel_rows(weight, (2, 2))[0], torch.tensor([0, 1, 6, 7]))


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
