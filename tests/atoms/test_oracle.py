"""Every variant on every kind of layer against the paper's equations, transcribed literally: NumPy and loops."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from atomdiff.atoms.sparse import sparse_coefficients
from atomdiff.atoms.update import updated_weight
from atomdiff.atoms.variants import TENSOR_NAMES
from atomdiff.tuner import AtomConfig, AtomLayer

LAYERS = {
    "3x3": lambda: nn.Conv2d(4, 6, 3),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "7x7": lambda: nn.Conv2d(4, 4, 7),
    "rectangular": lambda: nn.Conv2d(4, 6, (1, 5)),
    "channels not divisible": lambda: nn.Conv2d(5, 6, (2, 3)),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "1-d": lambda: nn.Conv1d(4, 6, 5),
    "1-d, transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "3-d": lambda: nn.Conv3d(2, 4, (2, 1, 3)),
    "linear": lambda: nn.Linear(4, 6),
}
VARIANTS = {
    "spatial": {"channel_block": 1},
    "few atoms": {"channel_block": 1, "num_atoms": 2},
    "separable": {"channel_block": 2},
    "separable, few atoms, dct": {"channel_block": 2, "num_atoms": 2, "basis": "dct"},
    "joint": {"channel_block": 2, "joint": True},
    "joint, few atoms, dct": {"channel_block": 2, "joint": True, "num_atoms": 3, "basis": "dct"},
    "recursion": {"channel_block": 1, "recursion": 3},
    "recursion, separable": {"channel_block": 2, "recursion": 2, "num_atoms": 2},
    "sparse": {"channel_block": 1, "basis": "sparse"},
    "sparse, overcomplete": {"channel_block": 2, "basis": "sparse", "num_atoms": 60},
    "sparse, joint": {"channel_block": 2, "basis": "sparse", "joint": True, "num_atoms": 5},
    "sparse, recursion": {"channel_block": 2, "basis": "sparse", "recursion": 2, "num_atoms": 2},
}


def make_layer(kind: str, variant: str) -> AtomLayer:
    """A float64 layer with one adapter "a" of random deltas."""
    torch.manual_seed(3)
    layer = AtomLayer(LAYERS[kind]())
    layer.update_layer("a", AtomConfig(**VARIANTS[variant]), kind)
    layer.set_adapter(["a"])
    for parameter in (p for key, p in layer.named_parameters() if key.endswith(".a")):
        nn.init.normal_(parameter, std=0.3)
    return layer.double()


def oracle(layer: AtomLayer, config: AtomConfig) -> np.ndarray:
    """The adapted weight by the equations alone, one block after the other."""
    weight = layer.base_layer.weight.detach().numpy()
    base = weight.reshape(*weight.shape[:2], -1)
    tensors = {kind: layer.tensors(kind)["a"].detach().numpy() for kind in TENSOR_NAMES if "a" in layer.tensors(kind)}
    p, q = (config.channel_block if size % config.channel_block == 0 else 1 for size in base.shape[:2])
    adapted = base.copy()
    if "atom_basis" in tensors:  # X' = X + A dD on each kernel, or on each whole block
        sides = (p, q) if config.joint else (1, 1)
        corners = list(itertools.product(range(0, base.shape[0], sides[0]), range(0, base.shape[1], sides[1])))
        rows = np.stack([base[o : o + sides[0], i : i + sides[1]].reshape(-1) for o, i in corners])
        coefficients = coefficients_of(rows, tensors["atom_basis"], config)
        for (o, i), row, of_row in zip(corners, rows, coefficients, strict=True):
            delta = tensors["atom_delta"] if "atom_delta" in tensors else combine(tensors, i)
            adapted[o : o + sides[0], i : i + sides[1]] = (row + of_row @ delta).reshape(*sides, -1)
    if "channel_basis" in tensors:  # the same on the channels of a block at each kernel position
        corners = list(itertools.product(range(0, base.shape[0], p), range(0, base.shape[1], q), range(base.shape[2])))
        rows = np.stack([adapted[o : o + p, i : i + q, n].reshape(-1) for o, i, n in corners])
        # Sparse coefficients are those of the base; those in orthonormal atoms follow what the kernels have become.
        source = base if config.basis == "sparse" else adapted
        source = np.stack([source[o : o + p, i : i + q, n].reshape(-1) for o, i, n in corners])
        coefficients = coefficients_of(source, tensors["channel_basis"], config)
        for (o, i, n), row, of_row in zip(corners, rows, coefficients, strict=True):
            adapted[o : o + p, i : i + q, n] = (row + of_row @ tensors["channel_delta"]).reshape(p, q)
    return adapted.reshape(weight.shape)


def combine(tensors: dict, channel: int) -> np.ndarray:
    """dD_i[m] = sum over j of beta[i, m, j] * dD1[m, j]."""
    mix, atoms = tensors["recursion_mix"], tensors["recursion_delta"]
    delta = np.zeros((atoms.shape[0], atoms.shape[2]))
    for m, j in itertools.product(range(atoms.shape[0]), range(atoms.shape[1])):
        delta[m] += mix[channel, m, j] * atoms[m, j]
    return delta


def coefficients_of(rows: np.ndarray, atoms: np.ndarray, config: AtomConfig) -> np.ndarray:
    """A = X D^T where D is orthonormal, else the lasso's solution (that is held against scikit-learn elsewhere)."""
    if config.basis != "sparse":
        return np.stack([atoms @ row for row in rows])
    return sparse_coefficients(torch.from_numpy(rows.copy()), torch.from_numpy(atoms), config.sparsity).numpy()


CASES = [
    (kind, variant)
    for kind, variant in itertools.product(LAYERS, VARIANTS)
    if not (kind in ("linear", "1x1") and variant.startswith("recursion") and "separable" not in variant)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_the_adapted_weight_is_that_of_the_equations(kind, variant):
    layer, config = make_layer(kind, variant), AtomConfig(**VARIANTS[variant])
    expected = oracle(layer, config)
    weight = layer.base_layer.weight.detach()
    assert np.abs(expected - weight.numpy()).max() > 1e-3
    for adapted in (updated_weight(weight, layer.weight_updates({"a": 1.0})), layer.adapted_weight(["a"])):
        assert np.abs(adapted.detach().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["3x3", "depthwise", "transposed, grouped", "linear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(kind, variant):
    layer = make_layer(kind, variant)
    tensors = {key: p.detach().requires_grad_() for key, p in layer.named_parameters() if key.endswith(".a")}
    shape = (1, layer.base_layer.in_features) if kind == "linear" else (1, layer.in_channels, 3, 3)
    x = torch.randn(shape, dtype=torch.float64)
    outputs = lambda *values: functional_call(layer, dict(zip(tensors, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(outputs, tuple(tensors.values()), fast_mode=True)
