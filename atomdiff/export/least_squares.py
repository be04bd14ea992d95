"""Least-squares fit of deltas: the atoms that bring a base weight nearest to a tuned one.

|R - A @ dD| over dD, with R = W1 - W0 as rows and A = X @ D.T or sparse coefficients, has the normal equations

    (A.T @ A) @ dD = A.T @ R                A.T @ A = D @ (X.T @ X) @ D.T  (m, m)

whose right and left sides are sums over all rows, gathered in float64. Kernels and channels together, where a block B
becomes (I + C).T @ B @ (I + S), are solved for in turn, each exactly while the other stays, and so are the two factors
of the deltas of `share="kind"`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from atomdiff.atoms.layout import as_kernels
from atomdiff.atoms.variant import Atoms
from atomdiff.atoms.variants import SharedAtoms
from atomdiff.export.shared_directions import improved_mixes, nearest_mixes
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.utils.float64 import in_float64

_NAME = "fitted"
_RANK_TOLERANCE = 1e-12  # of squared singular values: what is below comes from rounding in float32
_MAX_SWEEPS = 50
_SETTLED = 1e-5  # a sweep that lessens the residual by a smaller part is the last
_SHARED_SETTLED = 1e-4  # the same of a sweep over all layers
_ROUNDING = 1e-6  # a residual this small, of the difference, is due to rounding in float32
_CPU_PART = 1 << 22  # so that a large weight is never there in float64 as a whole


@torch.no_grad()
def fit_layers(
    modules: Mapping[str, nn.Module], tuned: Mapping[str, Tensor], config: AtomConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Fit the deltas of all layers of a model.

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
    return _fit_shared(modules, tuned, alone, tensors, config.share_count)


def _fit_shared(
    modules: Mapping[str, nn.Module],
    tuned: Mapping[str, Tensor],
    config: AtomConfig,
    alone: Mapping[str, Mapping[str, Tensor]],
    count: int,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """As `fit_layers`, of deltas that the layers of a kind mix from directions that they share.

    It begins near the deltas of each layer alone, layers being weighted by the norm of their weight, and takes the
    kinds in turn.

    Args:
        modules: path -> base layer.
        tuned: path -> weight to come near to.
        config: the atoms, without sharing.
        alone: path -> deltas (m, d) of each layer alone.
        count: directions of each kind.
    """
    kinds: dict[tuple[str, torch.Size], list[str]] = {}
    for path, of_layer in alone.items():
        for name, delta in of_layer.items():
            kinds.setdefault((name, delta.shape), []).append(path)
    weights = {path: cast(Tensor, module.weight) for path, module in modules.items()}
    deltas: dict[str, dict[str, Tensor]] = {path: {} for path in modules}
    tensors: dict[str, dict[str, Tensor]] = {path: {} for path in modules}

    def keep(kind: tuple[str, torch.Size], mixes: Tensor, directions: Tensor) -> None:
        name, shared = kind[0].removesuffix("_delta"), directions.float().reshape(-1, *kind[1])
        for path, mix in zip(kinds[kind], mixes.float(), strict=True):
            new = {f"{name}_mix": mix, f"{name}_shared": shared}
            tensors[path] |= new
            deltas[path] |= SharedAtoms.deltas(new)

    for kind, paths in kinds.items():
        rows = torch.stack([alone[path][kind[0]].flatten() for path in paths]).cpu().double()
        norms = torch.tensor([float(weights[path].float().norm()) for path in paths], dtype=torch.float64)
        keep(kind, *nearest_mixes(rows, norms, count))
    difference = math.hypot(*(float((tuned[path].float() - weight.float()).norm()) for path, weight in weights.items()))
    residual = math.inf
    for _ in range(_MAX_SWEEPS if len({name for name, _ in kinds}) > 1 else 1):
        for kind, paths in kinds.items():
            sides = [
                _shared_equations(modules[path], tuned[path], config, path, deltas[path], kind[0]) for path in paths
            ]
            squares, mixed = (torch.stack(side).cpu() for side in zip(*sides, strict=True))
            mixes = torch.stack([tensors[path][kind[0].replace("_delta", "_mix")] for path in paths])
            keep(kind, *improved_mixes(mixes.double(), squares, mixed))
        residuals = {
            path: _residual(_layer(module, config, path, deltas[path]), tuned[path]) for path, module in modules.items()
        }
        before, residual = residual, math.hypot(*residuals.values())
        if residual >= (1 - _SHARED_SETTLED) * before or residual < _ROUNDING * difference:
            break
    return tensors, residuals


def _shared_equations(
    module: nn.Module, tuned: Tensor, config: AtomConfig, path: str, deltas: Mapping[str, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """The normal equations of one delta of a layer while the others stay."""
    layer = _layer(module, config, path, {**deltas, name: torch.zeros_like(deltas[name])})
    atoms = next(atoms for atoms in layer.atom_sets[_NAME] if atoms.delta_name == name)
    return _normal_equations(layer, atoms, tuned.to(layer.unmerged_weight()))


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


def _layer(module: nn.Module, config: AtomConfig, name: str, deltas: Mapping[str, Tensor]) -> AtomLayer:
    """A base layer with these deltas."""
    layer = AtomLayer(copy.deepcopy(module).to(torch.float32))
    layer.update_layer(_NAME, config, name)
    for kind, delta in deltas.items():
        layer.tensors(kind)[_NAME].copy_(delta)
    return layer


def _residual(layer: AtomLayer, tuned: Tensor) -> float:
    """The Frobenius norm of what a layer misses of a tuned weight."""
    return float((tuned.to(layer.unmerged_weight()) - layer.adapted_weight([_NAME])).norm())


def _best_delta(layer: AtomLayer, atoms: Atoms, target: Tensor) -> Tensor:
    """The delta dD (m, d) of one set of atoms, now zero, that minimizes |R - A @ dD|, R being what `target` has more.

    A and R are those of `_normal_equations`.
    """
    squares, mixed = _normal_equations(layer, atoms, target)
    return torch.linalg.pinv(squares, rtol=_RANK_TOLERANCE, hermitian=True) @ mixed


def _normal_equations(layer: AtomLayer, atoms: Atoms, target: Tensor) -> tuple[Tensor, Tensor]:
    """A.T @ A (m, m) and A.T @ R (m, d) of one set of atoms, whose delta is zero, in float64.

    A = X @ D.T of the rows X as the other set leaves them, or their sparse coefficients; R is what `target` has more.
    """
    start = layer.adapted_weight([_NAME])
    missing = atoms.view.columns(as_kernels(target - start))  # (batch, d, width)
    coefficients = layer.coefficients(_NAME, atoms)
    source = atoms.view.columns(as_kernels(start)) if coefficients is None else coefficients  # (batch, d or m, width)
    squares, mixed = _products(source, source), _products(source, missing)
    if coefficients is None:
        basis = in_float64(layer.tensors(f"{atoms.name}_basis")[_NAME])
        squares, mixed = basis @ squares @ basis.T, basis @ mixed
    return squares, mixed


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the batch of left @ right.T: (batch, m, width), (batch, d, width) -> (m, d) in float64."""
    at_once = max(1, _CPU_PART // max(1, left[0].numel()))
    pairs = zip(left.split(at_once), right.split(at_once), strict=True)
    return reduce(torch.add, ((in_float64(one) @ in_float64(two).mT).sum(dim=0) for one, two in pairs))
