"""What a concept changes of a weight, from the tensors of its file alone: for programs without diffusers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.settings import AtomSettings
from atomdiff.atoms.update import WeightUpdate, update_matrix
from atomdiff.atoms.variants import stored_atoms


def weight_updates(
    settings: AtomSettings, module: str, tensors: Mapping[str, Tensor], weight: Tensor, scale: float = 1.0
) -> list[WeightUpdate]:
    """Return the updates that a layer of a concept makes; those of several concepts are applied together.

    Args:
        settings: of the concept.
        module: path of the layer within its model, such as `conv_in`.
        tensors: of the layer, by kind, which fit the weight (`compatibility.check_weights`).
        weight: base weight (out, in/groups, ...), on whose device the updates are.
        scale: adapter weight.
    """
    basis = ATOM_BASES[settings.basis]
    tensors = {kind: tensor.to(weight.device) for kind, tensor in tensors.items()}
    updates = []
    for atoms in stored_atoms(settings, module, tensors, weight.shape):
        vectors = tensors.get(f"{atoms.name}_basis")
        if vectors is None:  # the same for all weights, and so not stored
            vectors = basis.first_atoms(atoms, weight, settings, settings.seed, module).to(weight.device)
        matrix = atoms.delta({**tensors, f"{atoms.name}_basis": vectors}.__getitem__)
        coefficients = None
        if basis.has_coefficients:
            rows = basis.coefficients(atoms.view.rows(weight), vectors, settings)
            coefficients = atoms.view.coefficient_columns(rows.to(weight.dtype), weight.shape)
        else:
            matrix = update_matrix(vectors, matrix)
        updates.append(WeightUpdate(atoms.view, scale * matrix, coefficients))
    return updates
