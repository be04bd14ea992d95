"""Does a concept fit a base, and how far is that base from the one it was made on?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from atomdiff.atoms.basis import singular_values
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.tuner.adapter_state import base_weights
from atomdiff.tuner.atom_basis import ATOM_BASES
from atomdiff.tuner.checks import check_readable
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.variants import Atoms, atoms_of
from atomdiff.utils.errors import UserError, warn
from atomdiff.utils.untrusted import MAX_ATOMS_PER_NUMBER, MAX_ROW_LENGTH, list_some, printable

# Distances measured on the toybox: the base rounded to bfloat16 0.00004; every weight changed at random by a tenth of
# its size 0.006; the base as it was earlier in its pretraining 0.11; an untrained model 0.23.
SAME_BASE = 0.002
DERIVED_BASE = 0.15

# Layers that differ between UNets of one base for inpainting, depth, super-resolution: axis of the weight that counts
# the channels of latents and of what else comes with them.
LATENT_AXES = {"conv_in": 1, "conv_out": 0}
_MOST_LATENT_CHANNELS = 32


# Fingerprints of weights as they are now: a second concept loads without a look at the whole base.
_FOUND: dict[Hashable, list[float]] = {}
_MOST_FOUND = 4096


def check_base(
    delta: ConceptFile, models: Mapping[str, nn.Module], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str], float]:
    """Check that a concept fits these models.

    Layers of components that the models lack, and the first and last convolution where they are of another number of
    latent channels (inpainting, depth, super-resolution), are left out; with `allow_mismatch` all that do not fit.

    Args:
        delta: the concept.
        models: component -> model.
        allow_mismatch: accept any distance, and load what fits.

    Returns:
        The part of the concept that fits, what is left out of it, for a message, and the distance between its base and
        these models.

    Warns:
        UserWarning: the models look like a derived base.

    Raises:
        UserError: shapes differ, or the distance is that of wholly different weights.
    """
    delta, left_out, distance = compare_base(delta, models, allow_mismatch)
    base = f" {printable(repr(delta.base_model))}" if delta.base_model else ""
    found = f"this base is at distance {distance:.3g} from the one that the concept was made on{base}"
    if distance > DERIVED_BASE and not allow_mismatch:
        raise UserError(
            f"{found} (a fine-tuned copy stays below {DERIVED_BASE}): load it into that one, "
            "or pass allow_base_mismatch=True"
        )
    if distance > SAME_BASE:
        warn(f"{found} (0: the same): the concept may look different here")
    return delta, left_out, distance


def compare_base(
    delta: ConceptFile, models: Mapping[str, nn.Module], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str], float]:
    """As `check_base`, at any distance and without a warning."""
    weights = weights_below(delta, models)
    delta, left_out = _fitting_part(delta, models, weights, allow_mismatch)
    return delta, left_out, base_distance(delta, weights)


def may_leave_out(module: str, allow_mismatch: bool = False) -> bool:
    """Whether the rest of an adapter can be used where a layer, by its path in the model, does not fit."""
    return allow_mismatch or module in LATENT_AXES


def weights_below(delta: ConceptFile, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Module -> base weight of every layer that could be adapted, in the components that a concept adapts."""
    components = {module.partition(".")[0] for module in delta.layers} & models.keys()
    for part in components:
        modules = [module.removeprefix(f"{part}.") for module in delta.layers if module.startswith(f"{part}.")]
        check_readable(models[part], modules)
    return {f"{part}.{module}": weight for part in components for module, weight in base_weights(models[part]).items()}


def fingerprint(weight: Tensor, config: AtomConfig, module: str) -> list[float]:
    """Singular values, to 6 digits, of a base weight's rows: those of the first atoms (kernels where there are any).

    Args:
        weight: (out, in/groups, ...) or (out, in).
        config: settings that shape the rows.
        module: path of the module within its model.
    """
    view = atoms_of(config, module, weight.shape)[0].view
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


def _channels(weight: Tensor) -> str:
    return f"from {weight.shape[1]} to {weight.shape[0]} channels"


def check_layers(delta: ConceptFile, weights: Mapping[str, Tensor]) -> None:
    """Check that every layer of a concept fits the layer of that name in the base.

    Args:
        delta: the concept.
        weights: module -> base weight, for all layers that could be adapted.

    Raises:
        UserError: layers are missing in the base, or have other shapes, or lack tensors.
    """
    _refuse(delta, _unfit_layers(delta, weights), weights)


def _refuse(delta: ConceptFile, unfit: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    fits = len(delta.layers) - len(unfit)
    way_out = f"; allow_base_mismatch=True loads the {fits} of {len(delta.layers)} layers that fit" if fits else ""
    if missing := [module for module in unfit if module not in weights]:
        raise UserError(
            f"this base has no {list_some(missing)}: the concept was made for another architecture{way_out}"
        )
    if unfit:
        raise UserError(f"the concept does not fit this base: {list_some(list(unfit.values()))}{way_out}")


def _unfit_layers(delta: ConceptFile, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Module -> why it does not fit the base, for the layers of a concept that do not.

    Raises:
        UserError: a layer takes more memory or time than there may be, whatever the base.
    """
    unfit, basis = {}, ATOM_BASES[delta.config.basis]
    for module, tensors in delta.layers.items():
        if module not in weights:
            unfit[module] = f"{module} is not there"
            continue
        try:
            atom_sets, expected = _expected(delta, module, tuple(weights[module].shape))
        except ValueError as error:
            unfit[module] = str(error)
            continue
        if (found := _found(delta, module)) != expected:
            unfit[module] = f"{module} (found {found}, this base takes {expected})"
        elif large := [a for a in atom_sets if a.size > MAX_ROW_LENGTH or a.num_atoms > MAX_ATOMS_PER_NUMBER * a.size]:
            count, size = large[0].num_atoms, large[0].size
            raise UserError(
                f"the concept has {count} atoms of {size} elements in {module}, which is too many: train one with "
                f"rows of at most {MAX_ROW_LENGTH} elements and at most {MAX_ATOMS_PER_NUMBER} times as many atoms as "
                "elements"
            )
        elif defects := list(
            filter(None, (basis.defect(tensors[f"{a.name}_basis"]) for a in atom_sets if basis.is_stored))
        ):
            raise UserError(
                f"the concept is damaged: the {delta.config.basis} atoms of {module} {defects[0]}; "
                "copy or download it again"
            )
    return unfit


def _found(delta: ConceptFile, module: str) -> dict[str, tuple[int, ...]]:
    shapes = {kind: tuple(tensor.shape) for kind, tensor in delta.layers[module].items()}
    return {**shapes, "fingerprint": (len(delta.fingerprint[module]),)}


def _expected(
    delta: ConceptFile, module: str, shape: tuple[int, ...]
) -> tuple[tuple[Atoms, ...], dict[str, tuple[int, ...]]]:
    """The atoms of a layer, and the shapes that a concept has for it; ValueError: its weight is too small."""
    atom_sets = atoms_of(delta.config, module.partition(".")[2], shape)
    expected = {name: size for atoms in atom_sets for name, size in atoms.stored_shapes(delta.config).items()}
    return atom_sets, {**expected, "fingerprint": (atom_sets[0].size,)}


def _fits_other_latents(delta: ConceptFile, module: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a layer would fit a first or last convolution like the base's, of another number of latent channels."""
    axis = LATENT_AXES.get(module.partition(".")[2])
    if axis is None or module not in weights:
        return False
    shape, found = tuple(weights[module].shape), _found(delta, module)
    for channels in range(1, _MOST_LATENT_CHANNELS + 1):
        with suppress(ValueError):
            if found == _expected(delta, module, (*shape[:axis], channels, *shape[axis + 1 :]))[1]:
                return True
    return False


def _fitting_part(
    delta: ConceptFile, models: Mapping[str, nn.Module], weights: Mapping[str, Tensor], allow_mismatch: bool
) -> tuple[ConceptFile, list[str]]:
    """A concept without the layers that it can do without here, and what they are."""
    unfit = _unfit_layers(delta, weights)
    absent = {module: module.partition(".")[0] for module in unfit if module.partition(".")[0] not in models}
    others = [module for module in unfit if module not in absent]
    if not allow_mismatch and any(not _fits_other_latents(delta, module, weights) for module in others):
        _refuse(delta, unfit, weights)
    if len(unfit) == len(delta.layers) and not delta.tokens:
        _refuse(delta, unfit, weights)
    if not unfit:
        return delta, []
    left_out = [f"the layers of {part}, which this pipeline does not have" for part in sorted({*absent.values()})]
    if others:
        left_out.append(
            list_some([f"{m} ({_channels(weights[m])} here)" if m in weights else m for m in sorted(others)])
        )
    layers = {module: kinds for module, kinds in delta.layers.items() if module not in unfit}
    fingerprint = {module: delta.fingerprint[module] for module in layers}
    return dataclasses.replace(delta, layers=layers, fingerprint=fingerprint), left_out


def base_distance(delta: ConceptFile, weights: Mapping[str, Tensor]) -> float:
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
