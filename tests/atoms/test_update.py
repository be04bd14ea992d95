"""The equation itself; every variant in full is in `test_oracle.py`, and every fast way is tested against it."""

import torch

from atomdiff.atoms.basis import svd_atoms
from atomdiff.atoms.layout import View
from atomdiff.atoms.update import WeightUpdate, recursive_delta, update_matrix, updated_weight


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_an_update_of_rows_is_the_papers():
    weight = random(5, 4, 3, 3)
    rows, delta = View().rows(weight), random(6, 9, seed=1)
    atoms = svd_atoms(rows, 6).double()
    coefficients = rows @ atoms.T  # A = X @ D.T
    papers = rows + coefficients @ delta  # X' = X + A @ dD
    columns = View().coefficient_columns(coefficients, weight.shape)
    for update in (
        WeightUpdate(View(), update_matrix(atoms, delta)),
        WeightUpdate(View(), delta, columns),
    ):
        ours = View().rows(updated_weight(weight, [update]))
        torch.testing.assert_close(ours, papers, rtol=1e-12, atol=1e-12)


def test_kernels_and_channels_together_are_the_separable_form():
    weight, spatial, channel = random(4, 6, 3, 2), random(6, 6, seed=1), random(4, 4, seed=2)
    updates = [WeightUpdate(View((2, 2), spans_kernel=False), channel), WeightUpdate(View(), spatial)]
    ours = updated_weight(weight, updates)
    for o in (0, 2):
        for i in (0, 2, 4):
            block = weight[o : o + 2, i : i + 2].reshape(4, 6)
            expected = (torch.eye(4) + channel).T @ block @ (torch.eye(6) + spatial)
            torch.testing.assert_close(ours[o : o + 2, i : i + 2].reshape(4, 6), expected)


def test_with_recursion_each_input_has_its_own_delta():
    weight, mix, delta = random(4, 3, 3, 3), random(3, 5, 2, seed=1), random(5, 2, 9, seed=2)
    atoms = random(5, 9, seed=3)
    of_input = recursive_delta(mix, delta)  # (in, m, d)
    ours = updated_weight(weight, [WeightUpdate(View(by_input=True), update_matrix(atoms, of_input))])
    for channel in range(3):
        alone = WeightUpdate(View(), update_matrix(atoms, of_input[channel]))
        torch.testing.assert_close(ours[:, channel], updated_weight(weight, [alone])[:, channel])
