"""Directions of a delta: their importance by loops, and truncation along them."""

import math

import numpy as np
import torch

from atomdiff.atoms.basis import singular_values, svd_atoms
from atomdiff.atoms.directions import principal_directions, truncate


def relative_change(rows, atoms, delta, direction):
    """|A @ dD @ v| / |X| by loops."""
    changed = whole = 0.0
    for row in rows:
        value = 0.0
        for atom, change in zip(atoms, delta, strict=True):
            value += sum(x * d for x, d in zip(row, atom, strict=True)) * sum(
                c * v for c, v in zip(change, direction, strict=True)
            )
        changed += value**2
        whole += sum(x**2 for x in row)
    return math.sqrt(changed / whole)


def test_importance_is_the_relative_change_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    atoms, delta = svd_atoms(rows, 4), torch.randn(4, 6, generator=generator)
    squares = singular_values(rows) ** 2
    importance, directions = principal_directions(delta, (squares / squares.sum())[:4])
    assert directions.shape == (6, 4) and importance.tolist() == sorted(importance.tolist(), reverse=True)
    arrays = [np.asarray(each, float) for each in (rows, atoms, delta)]
    expected = [relative_change(*arrays, directions[:, k].numpy()) for k in range(4)]
    np.testing.assert_allclose(importance.numpy(), expected, rtol=1e-5)
    total = np.linalg.norm(arrays[0] @ arrays[1].T @ arrays[2]) / np.linalg.norm(arrays[0])
    np.testing.assert_allclose(float(importance.norm()), total, rtol=1e-5)


def test_changes_by_input_channel_count_alike():
    delta = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    importance, _ = principal_directions(delta, torch.tensor([0.75, 0.25]))
    squares = sum((np.diag([0.75, 0.25]) ** 0.5 @ each) ** 2 for each in delta.numpy()).sum() / 3
    np.testing.assert_allclose(float(importance.square().sum()), squares, rtol=1e-5)


def test_only_directions_of_a_change_are_found():
    one = torch.outer(torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 1, 0, 1, 0]))
    importance, directions = principal_directions(one, torch.full((3,), 0.2))
    assert directions.shape == (5, 1)
    np.testing.assert_allclose(importance.numpy(), [math.sqrt(14 * 2 * 0.2)], rtol=1e-6)
    assert principal_directions(torch.zeros(3, 5), torch.full((3,), 0.2))[1].shape == (5, 0)


def test_truncation_keeps_the_change_along_the_directions():
    generator = torch.Generator().manual_seed(1)
    atoms = svd_atoms(torch.randn(20, 6, generator=generator), 5)
    delta = torch.randn(5, 6, generator=generator)
    directions = principal_directions(delta, torch.full((5,), 1 / 6))[1][:, :2]
    new_atoms, new_delta = truncate(atoms, delta, directions)
    assert new_atoms.shape == new_delta.shape == (2, 6) and new_atoms.dtype == torch.float32
    torch.testing.assert_close(new_atoms @ new_atoms.T, torch.eye(2), atol=1e-6, rtol=0)
    projection = (directions @ directions.T).float()
    torch.testing.assert_close(new_atoms.T @ new_delta, atoms.T @ delta @ projection, atol=1e-5, rtol=0)
