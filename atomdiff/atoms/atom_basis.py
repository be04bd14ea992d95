"""The bases that atoms come from, chosen by `AtomSettings.basis`, and the coefficients of weights in them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atomdiff.atoms.basis import dct_atoms, svd_atoms
from atomdiff.atoms.sparse import sparse_atoms, sparse_coefficients

if TYPE_CHECKING:
    from atomdiff.atoms.settings import AtomSettings
    from atomdiff.atoms.variant import Atoms


class SvdBasis:
    """The singular vectors of a weight's rows. Other bases override what differs."""

    is_stored = True
    """Whether files hold the atoms beside their deltas: all do that depend on the weight."""
    is_overcomplete = False
    """Whether there may be more atoms than a row has numbers."""
    has_coefficients = False
    """Whether coefficients are tensors; else the atoms are orthonormal, and none are needed."""

    def first_atoms(self, atoms: Atoms, weight: Tensor, config: AtomSettings, seed: int, module_name: str) -> Tensor:
        """Atoms (m, d) that a layer starts with; zeros where a loader fills them in.

        Raises:
            ValueError: the weight has no values, or some that are not finite.
        """
        if config.filled_by_loader:
            return torch.zeros(atoms.num_atoms, atoms.size)
        if weight.is_meta:
            raise ValueError(
                f"the weight of {module_name} is on the meta device: load weights to fit atoms to, "
                "or count parameters with atomdiff.concepts.parameter_count"
            )
        return self.fit(atoms.view.rows(weight), atoms.num_atoms, config, seed, module_name)

    def fit(self, rows: Tensor, num_atoms: int, config: AtomSettings, seed: int, module_name: str) -> Tensor:
        """Atoms (num_atoms, d) of rows (blocks, d)."""
        return svd_atoms(rows, num_atoms)

    def coefficients(self, rows: Tensor, atoms: Tensor, config: AtomSettings) -> Tensor:
        """Coefficients (blocks, m) of rows (blocks, d)."""
        return rows @ atoms.to(rows).T

    def defect(self, atoms: Tensor) -> str:
        """What is wrong with stored atoms (m, d); empty: nothing."""
        return ""


class DctBasis(SvdBasis):
    """The discrete cosine transform, the same for all weights of a shape."""

    is_stored = False

    def first_atoms(self, atoms: Atoms, weight: Tensor, config: AtomSettings, seed: int, module_name: str) -> Tensor:
        """See `SvdBasis`."""
        return dct_atoms(atoms.axes, atoms.num_atoms)


class SparseBasis(SvdBasis):
    """The paper's: atoms learned so that few of them make up a row, with coefficients as large as the weight."""

    is_overcomplete = True
    has_coefficients = True
    _least, _longest = 2**-20, 2.0  # of entries that are not zero, and of norms: as stored, with some room

    def fit(self, rows: Tensor, num_atoms: int, config: AtomSettings, seed: int, module_name: str) -> Tensor:
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

    def coefficients(self, rows: Tensor, atoms: Tensor, config: AtomSettings) -> Tensor:
        """See `SvdBasis`."""
        return sparse_coefficients(rows, atoms.to(rows.device), config.sparsity)

    def defect(self, atoms: Tensor) -> str:
        """See `SvdBasis`: with others, coefficients cannot be worked out in float32."""
        sizes = atoms.abs()
        fine = ((sizes == 0) | (sizes >= self._least)).all() and (atoms.norm(dim=1) <= self._longest).all()
        return "" if fine else "are longer than 1 or have elements close to 0"


ATOM_BASES = {"svd": SvdBasis(), "dct": DctBasis(), "sparse": SparseBasis()}
"""`AtomSettings.basis` -> basis."""
