"""What the atoms of a concept change of a base, as vectors that can be compared and averaged.

Chen, Miao, Qiu, "Inner Product-based Neural Network Similarity", NeurIPS 2023: networks that share their coefficients
are as similar as their atoms. Concepts of one base share the coefficients of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.variants import variant_of
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import quick_hash
from atomdiff.utils.untrusted import list_some

_EQUAL_ATOMS = 1e-3  # largest difference of elements, and of a change from what atoms can make of it: float16 rounds
Fingerprint = Mapping[str, Sequence[float]]
"""Module -> singular values of the base weight's rows, as concept files have them."""


@dataclass(frozen=True)
class AtomChanges:
    """The changes of all atoms of a concept, which do not depend on the signs and the order of stored atoms."""

    spaces: dict[str, str]
    """Delta -> what its elements mean: those of two concepts can be compared if it is the same for both."""
    values: dict[str, Tensor]
    """Delta, such as `unet.conv_in.atom_delta` -> its change as a vector, float32 (elements,)."""
    fingerprint: Fingerprint
    """The base."""

    @property
    def norm(self) -> float:
        """The length of all values together."""
        return math.sqrt(sum(float(values.double().square().sum()) for values in self.values.values()))


def changes_of(concept: ConceptFile) -> AtomChanges:
    """Return the changes of a concept's atoms.

    With stored orthonormal atoms they are S = D.T @ dD (d, d), with those that are not stored, dD (m, d), since the
    atoms are the same in all files. With coefficients, too, but only files with the same atoms can be compared then.

    Raises:
        UserError: the concept has no atoms, or a layer has not one delta (m, d) for all input channels.
    """
    if not concept.layers:
        raise UserError("it has no atoms, only trigger words: expected a concept with adapted layers")
    spaces, values = {}, {}
    for module, tensors in concept.layers.items():
        deltas = variant_of(concept.config).deltas(tensors)
        if not deltas or any(delta.ndim != 2 for delta in deltas.values()):
            found = list_some(sorted(kind for kind in tensors if not kind.endswith("_basis")))
            raise UserError(f"{module} has {found}: expected one delta for all input channels, as without recursion")
        for name, delta in sorted(deltas.items()):
            atoms = tensors.get(name.replace("_delta", "_basis"))
            key = f"{module}.{name}"
            spaces[key], changes = _change(concept.config.basis, delta, atoms)
            values[key] = changes.flatten().cpu()
    return AtomChanges(spaces, values, concept.fingerprint)


def _change(basis: str, delta: Tensor, atoms: Tensor | None) -> tuple[str, Tensor]:
    shape = "x".join(map(str, delta.shape))
    if atoms is None:
        return f"{basis} {shape}", delta
    if ATOM_BASES[basis].has_coefficients:
        return f"{basis} {shape} {quick_hash([atoms])}", delta
    return f"{delta.shape[1]}x{delta.shape[1]}", atoms.T @ delta


def trained_on(atoms: Mapping[str, Tensor], tensors: Mapping[str, Tensor], basis: str) -> dict[str, Tensor]:
    """Return the trained tensors of a layer such that they make the same change on other atoms.

    Args:
        atoms: a layer's tensors with the other atoms, by kind.
        tensors: the layer's tensors, of which deltas (m, d) are solved for: D'.T @ dD' = D.T @ dD.
        basis: of both, as `AtomConfig` names it.

    Raises:
        UserError: the other atoms cannot make the same change.
    """
    trained = {kind: tensor for kind, tensor in tensors.items() if not kind.endswith("_basis")}
    for kind in tensors.keys() - trained.keys():
        delta, own, other = kind.replace("_basis", "_delta"), tensors[kind], atoms[kind]
        if own.shape == other.shape and torch.equal(own, other):
            continue
        if delta in trained and not ATOM_BASES[basis].has_coefficients:
            trained[delta] = _solve(other, own, trained[delta])
        elif own.shape != other.shape or not torch.allclose(own, other, rtol=0, atol=_EQUAL_ATOMS):
            raise UserError("it has other atoms, on which the same change cannot be made; start both from one seed")
    return trained


def _solve(atoms: Tensor, own: Tensor, delta: Tensor) -> Tensor:
    change = own.double().T @ delta.double()  # (d, d)
    solved = torch.linalg.lstsq(atoms.double().T, change).solution  # (m, d)
    if float((atoms.double().T @ solved - change).norm()) > _EQUAL_ATOMS * float(change.norm()):
        raise UserError(
            "it has other atoms, which make changes that these cannot make; with all atoms (num_atoms null) they could"
        )
    return solved.to(delta.dtype)
