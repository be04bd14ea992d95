"""The method in equations: how atoms update a weight.

Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

A weight W (out, in/groups, ...) seen as rows X (blocks, d) is a combination of m atoms D (m, d):

    X = A @ D + residual        A (blocks, m) coefficients, fixed
    X' = X + A @ dD             dD (m, d), trained

A row is a kernel, a whole block of p x q kernels (joint), or the p x q channels of a block at one kernel position.
Orthonormal atoms have A = X @ D.T, so that no coefficients are needed:

    X' = X + X @ S              S = D.T @ dD  (d, d)

Kernels and channels together are the separable form: a block B (p * q, k * l) becomes (I + C).T @ B @ (I + S). With
recursion each input channel i has a dD_i of its own, a combination of trained ones, and so an S_i.

`updated_weight` says this and no more. The same in less time or memory: `merge` writes it into a weight, `autograd`
trains it, `batched` gives each sample of a batch an update of its own, `im2col` moves it from the weight to the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from atomdiff.atoms.layout import View


@dataclass(frozen=True)
class WeightUpdate:
    """An update of the rows X of a weight: X @ matrix, or A @ matrix with coefficients A."""

    view: View
    """How the weight is seen as rows."""
    matrix: Tensor
    """S (d, d), or dD (m, d) with coefficients; with a leading axis of input channels where `view.by_input`."""
    coefficients: Tensor | None = None
    """A as `View.coefficient_columns` arranges it, or None: the rows themselves."""

    def to(self, device: torch.device) -> WeightUpdate:
        """The update on a device."""
        if self.matrix.device == device:
            return self
        coefficients = None if self.coefficients is None else self.coefficients.to(device)
        return WeightUpdate(self.view, self.matrix.to(device), coefficients)


def update_matrix(atoms: Tensor, delta: Tensor) -> Tensor:
    """S = D.T @ dD: atoms (m, d), delta (m, d) or (in, m, d) -> (d, d) or (in, d, d), in at least float32."""
    wide = torch.promote_types(delta.dtype, torch.float32)
    return atoms.to(wide).T @ delta.to(wide)


def recursive_delta(mix: Tensor, delta: Tensor) -> Tensor:
    """dD_i[m] = sum over j of beta[i, m, j] * dD1[m, j]: mix (in, m, m1), delta (m, m1, d) -> (in, m, d)."""
    return einsum(mix, delta, "i m j, m j d -> i m d")


def shared_delta(mix: Tensor, shared: Tensor) -> Tensor:
    """DD = sum over k of a_k * E_k: mix (n,), shared (n, m, d) -> (m, d)."""
    return einsum(mix, shared.to(mix.device), "n, n m d -> m d")


def updated_weight(weight: Tensor, updates: Sequence[WeightUpdate]) -> Tensor:
    """The adapted weight: all updates of kernels and whole blocks are added to it, to that all updates of channels.

    This is the reference that every fast way is tested against, for W (out, in/groups, ...) and updates in any order.
    """
    for spans_kernel in (True, False):
        base = weight
        for update in updates:
            if update.view.spans_kernel is spans_kernel:
                weight = weight + update.view.from_rows(_row_update(base, update), weight.shape)
    return weight


def _row_update(weight: Tensor, update: WeightUpdate) -> Tensor:
    """X @ S or A @ dD, for all rows (blocks, d) of a weight."""
    factors = update.view.rows(weight)  # (blocks, d)
    if update.coefficients is not None:
        factors = update.view.coefficient_rows(update.coefficients, weight.shape)  # (blocks, m)
    if not update.view.by_input:
        return factors @ update.matrix
    of_input = rearrange(factors, "(o i) m -> i o m", i=len(update.matrix))
    return rearrange(of_input @ update.matrix, "i o d -> (o i) d")
