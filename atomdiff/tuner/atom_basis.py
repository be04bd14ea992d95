"""The bases that atoms come from, chosen by `AtomConfig.basis`, and the coefficients of weights in them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from atomdiff.atoms.basis import dct_atoms, svd_atoms
from atomdiff.atoms.sparse import sparse_atoms, sparse_coefficients

if TYPE_CHECKING:
    from atomdiff.tuner.config import AtomConfig


class SvdBasis:
    """The singular vectors of a weight's rows. Other bases override what differs."""

    is_stored = True
    """Whether files hold the atoms beside their deltas: all do that depend on the weight."""
    is_overcomplete = False
    """Whether there may be more atoms than a row has numbers."""
    has_coefficients = False
    """Whether coefficients are tensors; else the atoms are orthonormal, and none are needed."""

    def fit(self, rows: Tensor, num_atoms: int, config: AtomConfig, seed: int, module_name: str) -> Tensor:
        """Atoms (num_atoms, d) of rows (blocks, d)."""
        return svd_atoms(rows, num_atoms)

    def fixed(self, axes: Sequence[int], num_atoms: int) -> Tensor | None:
        """Atoms (num_atoms, d) that are the same for all weights; None: they have to be fitted."""
        return None

    def coefficients(self, rows: Tensor, atoms: Tensor, config: AtomConfig) -> Tensor:
        """Coefficients (blocks, m) of rows (blocks, d)."""
        return rows @ atoms.to(rows).T

    def defect(self, atoms: Tensor) -> str:
        """What is wrong with stored atoms (m, d); empty: nothing."""
        return ""


class DctBasis(SvdBasis):
    """The discrete cosine transform, the same for all weights of a shape."""

    is_stored = False

    def fixed(self, axes: Sequence[int], num_atoms: int) -> Tensor | None:
        """See `SvdBasis`."""
        return dct_atoms(axes, num_atoms)


class SparseBasis(SvdBasis):
    """The paper's: atoms learned so that few of them make up a row, with coefficients as large as the weight."""

    is_overcomplete = True
    has_coefficients = True
    _least, _longest = 2**-20, 2.0  # of entries that are not zero, and of norms: as stored, with some room

    def fit(self, rows: Tensor, num_atoms: int, config: AtomConfig, seed: int, module_name: str) -> Tensor:
        """See `SvdBasis`.

        Warns:
            UserWarning: no row is longer than `config.sparsity`, so that its coefficients are zero.
        """
        if len(rows) and float(rows.float().norm(dim=1).max()) <= config.sparsity:
            warnings.warn(
                f"no row of {module_name} is longer than sparsity={config.sparsity:g}: its sparse coefficients are "
                "zero and its atoms will change nothing; lower sparsity or leave the layer out",
                stacklevel=2,
            )
        return sparse_atoms(rows, num_atoms, config.sparsity, seed)

    def coefficients(self, rows: Tensor, atoms: Tensor, config: AtomConfig) -> Tensor:
        """See `SvdBasis`."""
        return sparse_coefficients(rows, atoms.to(rows.device), config.sparsity)

    def defect(self, atoms: Tensor) -> str:
        """See `SvdBasis`: with others, coefficients cannot be worked out in float32."""
        sizes = atoms.abs()
        fine = ((sizes == 0) | (sizes >= self._least)).all() and (atoms.norm(dim=1) <= self._longest).all()
        return "" if fine else "are longer than 1 or hold numbers next to 0"


ATOM_BASES = {"svd": SvdBasis(), "dct": DctBasis(), "sparse": SparseBasis()}
"""`AtomConfig.basis` -> basis."""
