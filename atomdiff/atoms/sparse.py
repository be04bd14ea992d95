"""Atoms in which a weight's rows are sparse, and their coefficients: dictionary learning and the lasso.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269. For rows X (blocks, d),
coefficients A (blocks, m) and atoms D (m, d), any m:

    min over A, D of  1/2 ||X - A @ D||^2 + sparsity * ||A||_1        rows of D of norm at most 1

The coefficients are found by FISTA (Beck & Teboulle 2009), the atoms by alternating with block-coordinate updates
(Mairal, Bach, Ponce, Sapiro 2009). Work is done on columns, A.T (m, columns): a small matrix times long rows is what
CPUs do fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.atoms.basis import svd_atoms

_CPU_CHUNK = 1 << 18  # coefficients at once: the arrays of a chunk stay in the cache (2**16 to 2**19 are equally fast)
_GPU_CHUNK = 1 << 25
_TOLERANCE = 1e-5
_MAX_STEPS = 200
_CHECK_EVERY = 5
_SAMPLE = 1 << 13  # rows; learning from all 40,000 to 74,000 of trained layers lowers the objective by another 0.2 %
_MAX_ALTERNATIONS = 100
_ALTERNATION_STEPS = 20  # FISTA steps an alternation; each starts from the coefficients of the one before
_LEAST_GAIN = 1e-4  # relative, over `_WINDOW` alternations
_WINDOW = 10


@dataclass(frozen=True)
class SparseQuality:
    """How well coefficients A and atoms D describe rows X."""

    objective: float
    """(1/2 ||X - A @ D||^2 + sparsity * ||A||_1) / blocks: the mean over rows."""
    relative_error: float
    """||X - A @ D|| / ||X||, Frobenius norms; 0 where X is zero."""
    zero_fraction: float
    """Share of the coefficients that are exactly zero."""


def sparse_atoms(rows: Tensor, num_atoms: int, sparsity: float = 1e-3, seed: int = 0) -> Tensor:
    """Atoms learned from rows (blocks, d), on their device: float32 (num_atoms, d), `num_atoms` of any size.

    They start as the top right-singular vectors, followed by randomly chosen rows where `num_atoms` exceeds d.
    Coefficients and atoms then take turns on a random sample of at most 8192 rows, with momentum, until ten turns lower
    the objective by less than 1e-4 of its value, or 100 turns have passed. An atom that no row uses takes the direction
    of the worst described row, unless no direction would be used at this sparsity: then it stays.

    The result depends on the arguments only; the global random state is neither read nor changed. Each entry has at
    most 8 significant bits and is zero or at least 2**-14 in magnitude, so float16, bfloat16 and float32 all hold it
    exactly: a file may store the atoms in any of them, and the coefficients come back the same. Norms are at most 1.

    Raises:
        ValueError: a value in `rows` is not finite, `num_atoms` is below 1, or `sparsity` is not above 0 and finite.
    """
    _check_sparsity(sparsity)
    if num_atoms < 1:
        raise ValueError(f"num_atoms={num_atoms}, but expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        atoms = svd_atoms(rows, min(num_atoms, rows.shape[1]))
        chosen = torch.randperm(len(rows), generator=generator, device="cpu")[:_SAMPLE]
        sample = rows[chosen.to(rows.device)].to(_wide(rows))
        missing = num_atoms - len(atoms)
        if missing > 0:
            atoms = torch.cat([atoms, _random_atoms(sample, missing, generator)])
        return _storable(_learn(sample, atoms, sparsity)).to(rows.device)


def sparse_coefficients(rows: Tensor, atoms: Tensor, sparsity: float = 1e-3) -> Tensor:
    """Coefficients A (blocks, m) that minimize 1/2 ||X - A @ D||^2 + sparsity * ||A||_1 for rows X (blocks, d).

    FISTA from zero, in chunks of rows. A chunk is done when no coefficient changes in a step by more than 1e-5 of the
    largest one, or after 200 steps. With linearly independent atoms that is the minimum to about 1 % of `sparsity` in
    each coefficient; with more atoms than d the steps mostly run out, and the objective is within about 0.2 % of
    its minimum. The same rows and atoms give the same coefficients every time.

    Args:
        rows: X (blocks, d), any floating dtype. Never copied as a whole.
        atoms: D (m, d), on any device.
        sparsity: weight of the L1 norm, in the unit of `rows`.

    Returns:
        float32, or float64 for float64 rows, on the device of `rows`.

    Raises:
        ValueError: a value in `rows` or `atoms` is not finite, or `sparsity` is not above 0 and finite.
    """
    _check_sparsity(sparsity)
    wide = _wide(rows)
    coefficients = torch.empty(len(rows), len(atoms), dtype=wide, device=rows.device)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        # Copies are aligned, and BLAS rounds the same only if they are.
        dictionary = atoms.to(rows.device, wide, copy=True)
        products = _gram(dictionary)
        for span in _chunks(rows, len(atoms)):
            projections = dictionary @ rows[span].to(wide, copy=True).T  # (m, columns)
            if not torch.isfinite(projections).all():
                raise ValueError("the rows or the atoms hold values that are not finite: they have no coefficients")
            coefficients[span] = _lasso(projections, products, sparsity, torch.zeros_like(projections), _MAX_STEPS).T
    return coefficients


def sparse_quality(rows: Tensor, atoms: Tensor, coefficients: Tensor, sparsity: float) -> SparseQuality:
    """Measure coefficients (blocks, m) of rows (blocks, d) in atoms (m, d); sums over rows in float64."""
    error = norm = magnitude = zeros = 0.0
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        for span in _chunks(rows, len(atoms)):
            part, of_part = rows[span].to(_wide(rows)), coefficients[span]
            error += float((part - of_part @ atoms.to(part)).square().sum())
            norm += float(part.square().sum())
            magnitude += float(of_part.abs().sum())
            zeros += float((of_part == 0).sum())
    return SparseQuality(
        objective=(error / 2 + sparsity * magnitude) / max(len(rows), 1),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        zero_fraction=zeros / max(coefficients.numel(), 1),
    )


def _lasso(projections: Tensor, products: Tensor, sparsity: float, start: Tensor, max_steps: int) -> Tensor:
    """FISTA on b = D @ X.T (m, columns) and G = D @ D.T (m, m, float64): A.T (m, columns).

    One step, from the point y, is a = shrink(y - (G @ y - b) / L, sparsity / L), L the largest eigenvalue of G. The
    momentum never exceeds (1 - r) / (1 + r), r = sqrt(smallest eigenvalue / L), which is Nesterov's best constant one
    where G has full rank: half the steps for nearly orthogonal atoms, and plain FISTA where G is singular. `start`, of
    the result's shape, is overwritten.
    """
    eigenvalues = torch.linalg.eigvalsh(products).clamp(min=0).tolist()
    largest = eigenvalues[-1] or 1.0  # atoms that are all zero leave every coefficient zero
    root = math.sqrt(eigenvalues[0] / largest)
    most_momentum, threshold = (1 - root) / (1 + root), sparsity / largest
    step = (torch.eye(len(products), dtype=products.dtype, device=products.device) - products / largest).to(projections)
    shift = projections / largest
    coefficients, point = start, start.clone()
    moved, shrunk = torch.empty_like(start), torch.empty_like(start)
    pace = 1.0
    for count in range(1, max_steps + 1):
        torch.addmm(shift, step, point, out=moved)
        torch.clamp(moved, -threshold, threshold, out=shrunk)
        torch.sub(moved, shrunk, out=shrunk)  # exactly zero within the threshold
        if count % _CHECK_EVERY == 0:
            change = torch.sub(shrunk, coefficients, out=moved).abs_().max()
            if change <= _TOLERANCE * shrunk.abs().max():
                return shrunk
        pace, last_pace = (1 + math.sqrt(1 + 4 * pace * pace)) / 2, pace
        momentum = min((last_pace - 1) / pace, most_momentum)
        torch.lerp(coefficients, shrunk, 1 + momentum, out=point)
        coefficients, shrunk = shrunk, coefficients
    return coefficients


def _learn(sample: Tensor, atoms: Tensor, sparsity: float) -> Tensor:
    """Alternate between coefficients and atoms on a sample (rows, d); the best atoms met, float64 on the CPU (m, d).

    At low sparsity the coefficients follow the atoms, and plain alternation creeps. So the atoms move on with
    Nesterov's momentum, which starts again whenever the objective rises (O'Donoghue & Candes 2015).
    """
    columns = sample.T.contiguous()  # (d, rows)
    coefficients = torch.zeros(len(atoms), len(sample), dtype=sample.dtype, device=sample.device)
    atoms = best = updated = atoms.cpu().to(torch.float64)
    pace, objectives, lowest = 1.0, [], []
    for _ in range(_MAX_ALTERNATIONS):
        dictionary = atoms.to(sample)
        coefficients = _lasso(dictionary @ columns, _gram(dictionary), sparsity, coefficients, _ALTERNATION_STEPS)
        residual = torch.addmm(columns, dictionary.T, coefficients, alpha=-1)  # (d, rows)
        objectives.append(float(residual.square().sum()) / 2 + sparsity * float(coefficients.abs().sum()))
        if objectives[-1] == min(objectives):
            best = atoms
        lowest.append(min(objectives))
        if len(lowest) > _WINDOW and lowest[-1 - _WINDOW] - lowest[-1] <= _LEAST_GAIN * lowest[-1]:
            break
        if objectives[-1] > objectives[-2:][0]:
            pace = 1.0
        updated, last = _update_atoms(atoms, coefficients, residual), updated
        change = updated - last
        unused = (coefficients == 0).all(dim=1).cpu()
        if unused.any():
            updated[unused] = _worst_described(updated[unused], residual, sparsity)
            change[unused] = 0
        pace, last_pace = (1 + math.sqrt(1 + 4 * pace * pace)) / 2, pace
        atoms = _within_unit_ball(updated + (last_pace - 1) / pace * change)
    return best


def _update_atoms(atoms: Tensor, coefficients: Tensor, residual: Tensor) -> Tensor:
    """One round of block-coordinate descent (Mairal et al. 2009, algorithm 2): each atom in turn takes its best value.

    Args:
        atoms: D (m, d), float64 on the CPU.
        coefficients: A.T (m, rows).
        residual: (X - A @ D).T (d, rows).
    """
    usage = (coefficients @ coefficients.T).cpu().to(torch.float64)  # (m, m)
    gradient = (coefficients @ residual.T).cpu().to(torch.float64)  # (m, d)
    updated = atoms.clone()
    for index in usage.diagonal().nonzero().flatten().tolist():
        descent = gradient[index] - usage[index] @ (updated - atoms)  # (d,)
        updated[index] = _within_unit_ball(updated[index] + descent / usage[index, index])
    return updated


def _worst_described(unused: Tensor, residual: Tensor, sparsity: float) -> Tensor:
    """Directions of the largest columns of the residual (d, rows) in place of unused atoms (n, d).

    A column no longer than `sparsity` would not use an atom of any direction: there the atom stays.
    """
    lengths, longest = residual.norm(dim=0).topk(min(len(unused), residual.shape[1]))  # (n,)
    directions = (residual[:, longest] / lengths).T.cpu().to(unused)  # (n, d)
    replaced = unused.clone()
    count = int((lengths > sparsity).sum())
    replaced[:count] = directions[:count]
    return replaced


def _random_atoms(sample: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions of the first rows of a shuffled sample (rows, d) that are not zero, then random ones: (count, d)."""
    rows = sample[sample.norm(dim=1) > 0][:count].to("cpu", torch.float32)
    noise = torch.randn(count - len(rows), sample.shape[1], generator=generator, device="cpu")
    return torch.nn.functional.normalize(torch.cat([rows, noise])).to(sample.device)


def _storable(atoms: Tensor) -> Tensor:
    """Atoms (m, d), float64, to float32: 8 significant bits at most, nothing between 0 and 2**-14, norms at most 1.

    bfloat16 has 8 bits, float16 has 11 but fewer below 2**-14, so these and float32 hold the result exactly. Rounding
    can lengthen an atom by 2**-8 of its length: of some slightly shorter ones, the longest within 1 is taken.
    """
    scales = 1 - 2**-8 * torch.linspace(0, 1, 33, dtype=atoms.dtype, device=atoms.device)
    rounded = (scales[:, None, None] * atoms).to(torch.bfloat16).to(atoms.dtype)  # (33, m, d)
    rounded = torch.where(rounded.abs() < 2**-14, 0.0, rounded)
    lengths = rounded.norm(dim=2)  # (33, m)
    longest = torch.where(lengths <= 1, lengths, -1.0).argmax(dim=0)  # (m,)
    return rounded[longest, torch.arange(len(atoms), device=atoms.device)].to(torch.float32)


def _within_unit_ball(atoms: Tensor) -> Tensor:
    """Shorten atoms (..., d) that are longer than 1."""
    return atoms / atoms.norm(dim=-1, keepdim=True).clamp(min=1)


def _gram(atoms: Tensor) -> Tensor:
    """D @ D.T (m, m), float64 on the CPU, where its eigenvalues are the same every time."""
    exact = atoms.cpu().to(torch.float64)
    return exact @ exact.T


def _chunks(rows: Tensor, num_atoms: int) -> list[slice]:
    """Spans of rows to be worked on at a time."""
    size = max((_CPU_CHUNK if rows.device.type == "cpu" else _GPU_CHUNK) // max(num_atoms, rows.shape[1]), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _check_sparsity(sparsity: float) -> None:
    if not (math.isfinite(sparsity) and sparsity > 0):
        raise ValueError(f"sparsity={sparsity}, but expected a finite number above 0")
