"""Least-squares fit of deltas: the atoms that bring a base weight nearest to a tuned one.

|R - A @ dD| over dD, with R = W1 - W0 as rows and A = X @ D.T or sparse coefficients, has the normal equations

    (A.T @ A) @ dD = A.T @ R                A.T @ A = D @ (X.T @ X) @ D.T  (m, m)

whose right and left sides are sums over all rows, gathered in float64. Kernels and channels together, where a block B
becomes (I + C).T @ B @ (I + S), are solved for in turn, each exactly while the other stays.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from atomdiff.atoms.layout import as_kernels
from atomdiff.atoms.variant import Atoms
from atomdiff.atoms.variants import SharedAtoms
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.utils.float64 import in_float64

_NAME = "fitted"
_RANK_TOLERANCE = 1e-12  # of squared singular values: what is below comes from rounding in float32
_MAX_SWEEPS = 50
_SETTLED = 1e-5  # a sweep that lessens the residual by a smaller part is the last
_ROUNDING = 1e-6  # a residual this small, of the difference, is due to rounding in float32
_CPU_PART = 1 << 22  # so that a large weight is never there in float64 as a whole


@torch.no_grad()
def fit_layers(
    modules: Mapping[str, nn.Module], tuned: Mapping[str, Tensor], config: AtomConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Fit the deltas of all layers of a model.

    With `share="kind"` those of one kind are the best approximation of the deltas of each layer alone, the layers being
    weighted by the norm of their weight.

    Args:
        modules: path -> base layer, that stays as it is.
        tuned: path -> weight (out, in/groups, ...) to come near to.
        config: the atoms, of a variant that least squares can fit.

    Returns:
        Path -> the tensors that a file holds, by kind; and the Frobenius norm of what they miss.
    """
    alone = dataclasses.replace(config, share=None)
    fitted = {name: fit_layer(module, tuned[name], alone, name) for name, module in modules.items()}
    tensors = {name: tensors for name, (tensors, _) in fitted.items()}
    if config.share is None:
        return tensors, {name: residual for name, (_, residual) in fitted.items()}
    norms = {name: float(cast(Tensor, module.weight).float().norm()) for name, module in modules.items()}
    shared = share_deltas(tensors, norms, config.share_count)
    residuals = {
        name: _residual(module, tuned[name], alone, name, SharedAtoms.deltas(shared[name]))
        for name, module in modules.items()
    }
    return shared, residuals


def share_deltas(
    layers: Mapping[str, Mapping[str, Tensor]], norms: Mapping[str, float], count: int
) -> dict[str, dict[str, Tensor]]:
    """The mixes a and directions E that minimize the sum over the layers of |norm * (dD - sum over k of a_k * E_k)|^2.

    Args:
        layers: module -> deltas (m, d) by kind, such as `atom_delta`.
        norms: module -> its weight in the sum.
        count: directions of each kind.
    """
    kinds: dict[tuple[str, torch.Size], list[str]] = {}
    for module, deltas in layers.items():
        for kind, delta in deltas.items():
            kinds.setdefault((kind.removesuffix("_delta"), delta.shape), []).append(module)
    shared: dict[str, dict[str, Tensor]] = {module: {} for module in layers}
    for (name, shape), modules in kinds.items():
        weights = torch.tensor([[norms[module]] for module in modules], dtype=torch.float64).clamp(min=1e-30)
        rows = torch.stack([layers[module][f"{name}_delta"].flatten() for module in modules]).cpu().double()
        left, values, right = torch.linalg.svd(weights * rows, full_matrices=False)
        rank = min(count, len(values))
        mixes, directions = torch.zeros(len(modules), count), torch.zeros(count, *shape)
        sizes = rows.norm(dim=1).max().clamp(min=1e-30)  # so that mixes are about 1, as half precision likes them
        mixes[:, :rank] = ((left * values / weights) / sizes)[:, :rank].float()
        directions[:rank] = (sizes * right[:rank]).reshape(rank, *shape).float()
        for module, mix in zip(modules, mixes, strict=True):
            shared[module] |= {f"{name}_mix": mix, f"{name}_shared": directions}
    return shared


@torch.no_grad()
def fit_layer(module: nn.Module, tuned: Tensor, config: AtomConfig, name: str) -> tuple[dict[str, Tensor], float]:
    """Fit the deltas of one layer to a tuned weight.

    Args:
        module: the base layer, that stays as it is.
        tuned: weight (out, in/groups, ...) to come near to.
        config: the atoms, of a variant that least squares can fit.
        name: path of the layer in its model.

    Returns:
        The tensors that a file holds, by kind, and the Frobenius norm of what they miss.
    """
    layer = AtomLayer(copy.deepcopy(module).to(torch.float32))
    layer.update_layer(_NAME, config, name)
    atom_sets = layer.atom_sets[_NAME]
    target = tuned.to(layer.unmerged_weight())
    residual = difference = float((target - layer.unmerged_weight()).norm())
    for _ in range(_MAX_SWEEPS if len(atom_sets) > 1 else 1):
        before = residual
        for atoms in atom_sets:
            delta = layer.tensors(f"{atoms.name}_delta")[_NAME]
            delta.zero_()
            delta.copy_(_best_delta(layer, atoms, target))
        residual = float((target - layer.adapted_weight([_NAME])).norm())
        if residual >= (1 - _SETTLED) * before or residual < _ROUNDING * difference:
            break
    names = [name for atoms in atom_sets for name in atoms.stored_shapes(config)]
    return {name: layer.tensors(name)[_NAME].detach().clone() for name in names}, residual


def _residual(module: nn.Module, tuned: Tensor, config: AtomConfig, name: str, deltas: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of what deltas miss of a tuned weight."""
    layer = AtomLayer(copy.deepcopy(module).to(torch.float32))
    layer.update_layer(_NAME, config, name)
    for kind, delta in deltas.items():
        layer.tensors(kind)[_NAME].copy_(delta)
    return float((tuned.to(layer.unmerged_weight()) - layer.adapted_weight([_NAME])).norm())


def _best_delta(layer: AtomLayer, atoms: Atoms, target: Tensor) -> Tensor:
    """The delta dD (m, d) of one set of atoms, now zero, that minimizes |R - A @ dD|, R being what `target` has more.

    A = X @ D.T of the rows X as the other set leaves them, or their sparse coefficients.
    """
    start = layer.adapted_weight([_NAME])
    missing = atoms.view.columns(as_kernels(target - start))  # (batch, d, width)
    coefficients = layer.coefficients(_NAME, atoms)
    source = atoms.view.columns(as_kernels(start)) if coefficients is None else coefficients  # (batch, d or m, width)
    squares, mixed = _products(source, source), _products(source, missing)
    if coefficients is None:
        basis = in_float64(layer.tensors(f"{atoms.name}_basis")[_NAME])
        squares, mixed = basis @ squares @ basis.T, basis @ mixed
    return torch.linalg.pinv(squares, rtol=_RANK_TOLERANCE, hermitian=True) @ mixed


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the batch of left @ right.T: (batch, m, width), (batch, d, width) -> (m, d) in float64."""
    at_once = max(1, _CPU_PART // max(1, left[0].numel()))
    pairs = zip(left.split(at_once), right.split(at_once), strict=True)
    return reduce(torch.add, ((in_float64(one) @ in_float64(two).mT).sum(dim=0) for one, two in pairs))
