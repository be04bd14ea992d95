"""Orthonormal atoms: singular vectors and the cosine transform."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atomdiff.atoms.basis import dct_atoms, gram, singular_values, svd_atoms
from atomdiff.utils.float64 import in_float64


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


class No64(TorchDispatchMode):
    """Fails on float64 tensors on Apple's GPUs, as they do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or (tensor.device.type, tensor.dtype) != ("mps", torch.float64)
        return result


def test_devices_without_float64_leave_it_to_the_cpu():
    with FakeTensorMode(), No64():
        rows = torch.empty(100, 9, device="mps")
        with pytest.raises(AssertionError):
            rows.to(torch.float64)
        for exact in (gram(rows), in_float64(rows)):
            assert (exact.device.type, exact.dtype) == ("cpu", torch.float64)
