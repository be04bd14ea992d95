"""Does a concept fit a base, and how far is that base from the one it was made on?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from atomdiff.atoms import singular_values
from atomdiff.delta_file import DeltaFile, shown, some
from atomdiff.errors import UserError
from atomdiff.tuner.attach import base_weights
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.factor import factors_of

# Distances measured on the toybox: the base rounded to bfloat16 0.00004; every weight changed at random by a tenth of
# its size 0.006; the base as it was earlier in its pretraining 0.11; an untrained model 0.23.
SAME_BASE = 0.002
DERIVED_BASE = 0.15

# A few small tensors can stand for matrices of (row, row) numbers, or for a sparse code of (blocks, atoms).
_LONGEST_ROW = 4096
_MOST_ATOMS = 8  # times the length of a row
_SPARSE_SIZES = (2**-20, 2.0)  # of numbers in sparse atoms that are not zero, and of their norms, with some room

# Fingerprints of weights as they are now: a second concept loads without a look at the whole base.
_FOUND: dict[Hashable, list[float]] = {}
_MOST_FOUND = 4096


def check_base(
    delta: DeltaFile, models: Mapping[str, nn.Module], allow_mismatch: bool = False, stacklevel: int = 3
) -> float:
    """Check that a concept fits these models, and give the distance between its base and them.

    Args:
        delta: the concept.
        models: component -> model.
        allow_mismatch: accept any distance.
        stacklevel: of the warning.

    Warns:
        UserWarning: the models look like a derived base.

    Raises:
        UserError: shapes differ, or the distance is that of wholly different weights.
    """
    weights = weights_below(delta, models)
    check_layers(delta, weights)
    distance = base_distance(delta, weights)
    base = f" {shown(repr(delta.base_model))}" if delta.base_model else ""
    found = f"this base is at distance {distance:.3g} from the one that the concept was made on{base}"
    if distance > DERIVED_BASE and not allow_mismatch:
        raise UserError(
            f"{found} (a fine-tuned copy stays below {DERIVED_BASE}): load it into that one, "
            "or pass allow_base_mismatch=True"
        )
    if distance > SAME_BASE:
        warnings.warn(f"{found} (0: the same): the concept may look different here", stacklevel=stacklevel)
    return distance


def weights_below(delta: DeltaFile, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Module -> base weight of every layer that could be adapted, in the components that a concept adapts."""
    components = {module.partition(".")[0] for module in delta.layers} & models.keys()
    return {f"{part}.{module}": weight for part in components for module, weight in base_weights(models[part]).items()}


def fingerprint(weight: Tensor, config: AtomConfig, module: str) -> list[float]:
    """Singular values, to 6 digits, of a base weight's rows: those of the first factor (kernels where there are any).

    Args:
        weight: (out, in/groups, ...) or (out, in).
        config: settings that shape the rows.
        module: path of the module within its model.
    """
    view = factors_of(config, module, weight.shape)[0].view
    key = view, _content_key(weight)
    if key not in _FOUND:
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = [float(f"{value:.6g}") for value in singular_values(view.rows(weight).detach()).tolist()]
    return list(_FOUND[key])


def _content_key(weight: Tensor) -> Hashable:
    """What tells a weight from others, and from itself as it was: its place, its version, and some of its numbers."""
    as_in_memory = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    numbers = weight.detach().permute(as_in_memory).reshape(-1)
    sample = numbers[:: max(len(numbers) // 1024, 1)].to(torch.float64)
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.dtype, weight.device, hash(sample.cpu().numpy().tobytes())


def check_layers(delta: DeltaFile, weights: Mapping[str, Tensor]) -> None:
    """Check that every layer of a concept fits the layer of that name in the base.

    Args:
        delta: the concept.
        weights: module -> base weight, for all layers that could be adapted.

    Raises:
        UserError: layers are missing in the base, or have other shapes, or lack tensors.
    """
    missing = [module for module in delta.layers if module not in weights]
    if missing:
        raise UserError(f"this base has no {some(missing)}: the concept was made for another architecture")
    wrong = []
    for module, tensors in delta.layers.items():
        try:
            factors = factors_of(delta.config, module.partition(".")[2], weights[module].shape)
        except ValueError as error:
            raise UserError(f"the concept does not fit this base: {error}") from error
        expected = {kind: shape for factor in factors for kind, shape in factor.stored(delta.config).items()}
        expected["fingerprint"] = (factors[0].size,)
        found: dict[str, tuple[int, ...]] = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        found["fingerprint"] = (len(delta.fingerprint[module]),)
        if found != expected:
            wrong.append(f"{module} (found {found}, this base takes {expected})")
        elif large := [f for f in factors if f.size > _LONGEST_ROW or f.num_atoms > _MOST_ATOMS * f.size]:
            count, size = large[0].num_atoms, large[0].size
            raise UserError(
                f"the concept has {count} atoms of {size} numbers in {module}, too many to work with: train one with "
                f"rows of at most {_LONGEST_ROW} numbers and at most {_MOST_ATOMS} times as many atoms as numbers"
            )
        elif delta.config.basis == "sparse" and not all(_have_codes(tensors[f"{f.kind}_basis"]) for f in factors):
            raise UserError(
                f"the concept is damaged: the sparse atoms of {module} are longer than 1 or hold numbers next to 0; "
                "copy or download it again"
            )
    if wrong:
        raise UserError(f"the concept does not fit this base: {some(wrong)}")


def _have_codes(atoms: Tensor) -> bool:
    """Whether sparse codes can be worked out in float32 for atoms (m, d), as they are learnt and stored."""
    least, most = _SPARSE_SIZES
    sizes = atoms.abs()
    return bool(((sizes == 0) | (sizes >= least)).all() and (atoms.norm(dim=1) <= most).all())


def base_distance(delta: DeltaFile, weights: Mapping[str, Tensor]) -> float:
    """How far a base is from the one that a concept was made on: 0 the same, around 1 nothing in common.

    Mean over the layers of |s - s'| / max(|s|, |s'|), s and s' being the singular values in the file and of the base.
    """
    distances = []
    for module, stored in delta.fingerprint.items():
        old = torch.tensor(stored, dtype=torch.float64)
        found = fingerprint(weights[module], delta.config, module.partition(".")[2])
        new = torch.tensor(found, dtype=torch.float64)
        size = max(float(old.norm()), float(new.norm()))
        distances.append(float((old - new).norm()) / size if size > 0 else 0.0)
    return math.fsum(distances) / len(distances) if distances else 0.0
