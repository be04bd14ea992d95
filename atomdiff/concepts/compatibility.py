"""Does a concept fit a base, and how far is that base from the one it was made on?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.basis import singular_values
from atomdiff.atoms.settings import AtomSettings
from atomdiff.atoms.variant import Atoms
from atomdiff.atoms.variants import atoms_of, stored_atoms
from atomdiff.concepts.compact_layers import REDUCED_LENGTH, reduce_fingerprint
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.utils.errors import UserError, warn
from atomdiff.utils.float64 import in_float64
from atomdiff.utils.untrusted import MAX_ATOMS_PER_NUMBER, MAX_ROW_LENGTH, list_some, printable

# Distances measured on the toybox's UNet: the base rounded to bfloat16 0.00003; every weight changed at random by a
# tenth of its size 0.005; the base before the last stage of its pretraining 0.35; an untrained model 0.63.
SAME_BASE = 0.002
DERIVED_BASE = 0.15

# Layers that differ between UNets of one base for inpainting, depth, super-resolution: axis of the weight that counts
# the channels of latents and of what else comes with them.
LATENT_AXES = {"conv_in": 1, "conv_out": 0}
_MOST_LATENT_CHANNELS = 32

_FINGERPRINTS: dict[Hashable, list[float]] = {}  # of weights as they are now: a second concept loads in no time
_MOST_FINGERPRINTS = 4096


def check_base(
    concept: ConceptFile, models: Mapping[str, nn.Module], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str]]:
    """Check that a concept fits these models.

    Layers of components that the models lack, and the first and last convolution where they are of another number of
    latent channels (inpainting, depth, super-resolution), are left out; with `allow_mismatch` all that do not fit.

    Args:
        concept: the concept.
        models: component -> model.
        allow_mismatch: accept any distance, and load what fits.

    Returns:
        The part of the concept that fits, and what is left out of it, for a message.

    Warns:
        UserWarning: the models look like a derived base.

    Raises:
        UserError: shapes differ, or the distance is that of wholly different weights.
    """
    return check_weights(concept, weights_below(concept, models), models.keys(), allow_mismatch)


def check_weights(
    concept: ConceptFile, weights: Mapping[str, Tensor], components: Collection[str], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str]]:
    """As `check_base`, with the base weights of all layers that could be adapted, by module, in place of models."""
    concept, left_out = fitting_part(concept, weights, components, allow_mismatch)
    distance = base_distance(concept, weights)
    base = f" {printable(repr(concept.base_model))}" if concept.base_model else ""
    found = f"this base is at distance {distance:.3g} from the one that the concept was made on{base}"
    if distance > DERIVED_BASE and not allow_mismatch:
        raise UserError(
            f"{found} (a fine-tuned copy stays below {DERIVED_BASE}): use that one, or load_atoms with "
            "allow_base_mismatch=True"
        )
    if distance > SAME_BASE:
        warn(f"{found} (0: the same): the concept may look different here")
    return concept, left_out


def compare_base(
    concept: ConceptFile, models: Mapping[str, nn.Module], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str], float]:
    """As `check_base`, at any distance and without a warning; return the distance, too."""
    weights = weights_below(concept, models)
    concept, left_out = fitting_part(concept, weights, models.keys(), allow_mismatch)
    return concept, left_out, base_distance(concept, weights)


def weights_below(concept: ConceptFile, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Module -> base weight of every layer that could be adapted, in the components that a concept adapts."""
    from atomdiff.tuner.adapter_state import base_weights  # with PEFT, which the rest of this module does without
    from atomdiff.tuner.checks import check_readable

    components = {module.partition(".")[0] for module in concept.layers} & models.keys()
    for part in components:
        modules = [module.removeprefix(f"{part}.") for module in concept.layers if module.startswith(f"{part}.")]
        check_readable(models[part], modules)
    return {f"{part}.{module}": weight for part in components for module, weight in base_weights(models[part]).items()}


def fitting_part(
    concept: ConceptFile, weights: Mapping[str, Tensor], components: Collection[str], allow_mismatch: bool = False
) -> tuple[ConceptFile, list[str]]:
    """Leave out the layers of a concept that it can do without on a base.

    Args:
        concept: the concept.
        weights: module -> base weight, for all layers that could be adapted.
        components: those that the base has.
        allow_mismatch: leave out all layers that do not fit.

    Returns:
        The part that fits, and what is left out, for a message.

    Raises:
        UserError: layers that it cannot do without are missing in the base, have other shapes or lack tensors, or none
            is left.
    """
    unfit = _unfit_layers(concept, weights)
    if not unfit:
        return concept, []
    absent = {module.partition(".")[0] for module in unfit} - {*components}
    unlike = sorted(module for module in unfit if module.partition(".")[0] not in absent)
    can_do_without = allow_mismatch or all(_fits_other_latents(concept, module, weights) for module in unlike)
    if not can_do_without or (len(unfit) == len(concept.layers) and not concept.tokens):
        raise _misfit(concept, unfit, weights)
    layers = {module: tensors for module, tensors in concept.layers.items() if module not in unfit}
    fingerprints = {module: concept.fingerprint[module] for module in layers}
    left_out = name_left_out(absent, [f"{m}{_channels(weights[m])}" if m in weights else m for m in unlike])
    return dataclasses.replace(concept, layers=layers, fingerprint=fingerprints), left_out


def name_left_out(absent: Iterable[str], layers: Sequence[str]) -> list[str]:
    """Name what is left out of a concept, for a message: layers of components that a pipeline lacks, and others."""
    left_out = [f"the layers of {component}, which this pipeline does not have" for component in sorted(absent)]
    return left_out + ([list_some(layers)] if layers else [])


def may_leave_out(module: str, allow_mismatch: bool = False) -> bool:
    """Whether the rest of an adapter can be used where a layer, by its path in the model, does not fit."""
    return allow_mismatch or module in LATENT_AXES


def _misfit(concept: ConceptFile, unfit: Mapping[str, str], weights: Mapping[str, Tensor]) -> UserError:
    """Return the error of a concept with layers that do not fit: module -> why."""
    fits = len(concept.layers) - len(unfit)
    way_out = f"; allow_base_mismatch=True loads the {fits} of {len(concept.layers)} layers that fit" if fits else ""
    if missing := [module for module in unfit if module not in weights]:
        made_for = f", that of {printable(repr(concept.base_model))}" if concept.base_model else ""
        return UserError(
            f"this base has no {list_some(missing)}: the concept was made for another architecture{made_for}{way_out}"
        )
    return UserError(f"the concept does not fit this base: {list_some(list(unfit.values()))}{way_out}")


def _channels(weight: Tensor) -> str:
    return f" (from {weight.shape[1]} to {weight.shape[0]} channels here)"


def _unfit_layers(concept: ConceptFile, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Module -> why it does not fit the base, for the layers of a concept that do not.

    Raises:
        UserError: a layer takes more memory or time than there may be, whatever the base, or is damaged.
    """
    unfit = {}
    for module in concept.layers:
        if module not in weights:
            unfit[module] = f"{module} is not there"
            continue
        try:
            atom_sets, expected = _expected_shapes(concept, module, tuple(weights[module].shape))
        except ValueError as error:
            unfit[module] = str(error)
            continue
        if (found := _shapes(concept, module)) != expected:
            unfit[module] = f"{module} (found {found}, this base takes {expected})"
        else:
            _check_atoms(concept, module, atom_sets)
    return unfit


def _check_atoms(concept: ConceptFile, module: str, atom_sets: Iterable[Atoms]) -> None:
    """Check that the atoms of a layer that fits are few and short enough, and as their basis has them."""
    basis = ATOM_BASES[concept.config.basis]
    for atoms in atom_sets:
        if atoms.size > MAX_ROW_LENGTH or atoms.num_atoms > MAX_ATOMS_PER_NUMBER * atoms.size:
            raise UserError(
                f"the concept has {atoms.num_atoms} atoms of {atoms.size} elements in {module}, which is too many: "
                f"train one with rows of at most {MAX_ROW_LENGTH} elements and at most {MAX_ATOMS_PER_NUMBER} times as "
                "many atoms as elements"
            )
    for atoms in atom_sets if basis.is_stored else ():
        if defect := basis.defect(concept.layers[module][f"{atoms.name}_basis"]):
            raise UserError(
                f"the concept is damaged: the {concept.config.basis} atoms of {module} {defect}; "
                "copy or download it again"
            )


def _shapes(concept: ConceptFile, module: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what a concept has for a layer."""
    shapes = {kind: tuple(tensor.shape) for kind, tensor in concept.layers[module].items()}
    return {**shapes, "fingerprint": (len(concept.fingerprint[module]),)}


def _expected_shapes(
    concept: ConceptFile, module: str, shape: tuple[int, ...]
) -> tuple[tuple[Atoms, ...], dict[str, tuple[int, ...]]]:
    """The atoms of a layer whose weight has this shape, and the shapes of what a concept has for it.

    Raises:
        ValueError: the weight is too small.
    """
    config, path = concept.config, module.partition(".")[2]
    atom_sets = atoms_of(config, path, shape)
    fingerprint_size = atom_sets[0].size
    if config.share and len(concept.fingerprint[module]) < fingerprint_size:
        fingerprint_size = REDUCED_LENGTH
    atom_sets = stored_atoms(config, path, concept.layers[module], shape)
    expected = {name: size for atoms in atom_sets for name, size in atoms.stored_shapes(config).items()}
    return atom_sets, {**expected, "fingerprint": (fingerprint_size,)}


def _fits_other_latents(concept: ConceptFile, module: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a layer would fit a first or last convolution like the base's, of another number of latent channels."""
    axis = LATENT_AXES.get(module.partition(".")[2])
    if axis is None or module not in weights:
        return False
    shape, found = tuple(weights[module].shape), _shapes(concept, module)
    for channels in range(1, _MOST_LATENT_CHANNELS + 1):
        with suppress(ValueError):
            if found == _expected_shapes(concept, module, (*shape[:axis], channels, *shape[axis + 1 :]))[1]:
                return True
    return False


def base_distance(concept: ConceptFile, weights: Mapping[str, Tensor]) -> float:
    """How far a base is from the one that a concept was made on: 0 the same, around 1 nothing in common.

    Mean over the layers of |s - s'| / max(|s|, |s'|), s and s' being the singular values in the file and of the base.
    """
    here = {
        module: fingerprint(weights[module], concept.config, module.partition(".")[2]) for module in concept.fingerprint
    }
    return fingerprint_distance(concept.fingerprint, here)


def fingerprint_distance(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> float:
    """As `base_distance`, of two fingerprints, over the layers that both have; infinite for rows of other lengths.

    Where one of the two is reduced, so is the other before they are compared.
    """
    distances = []
    for module in one.keys() & other.keys():
        values = one[module], other[module]
        if REDUCED_LENGTH in map(len, values):
            values = reduce_fingerprint(values[0]), reduce_fingerprint(values[1])
        if len(values[0]) != len(values[1]):
            return math.inf
        size = max(math.hypot(*values[0]), math.hypot(*values[1]))
        distances.append(math.dist(*values) / size if size > 0 else 0.0)
    return math.fsum(distances) / len(distances) if distances else 0.0


def fingerprint(weight: Tensor, config: AtomSettings, module: str) -> list[float]:
    """Singular values, to 6 digits, of a base weight's rows: those of the first atoms (kernels where there are any).

    Args:
        weight: (out, in/groups, ...) or (out, in).
        config: settings that shape the rows.
        module: path of the module within its model.
    """
    view = atoms_of(config, module, weight.shape)[0].view
    key = view, _content_key(weight)
    found = _FINGERPRINTS.get(key)
    if found is None:
        if len(_FINGERPRINTS) >= _MOST_FINGERPRINTS:
            _FINGERPRINTS.clear()
        values = singular_values(view.rows(weight).detach()).tolist()
        found = _FINGERPRINTS[key] = [float(f"{value:.6g}") for value in values]
    return list(found)


def _content_key(weight: Tensor) -> Hashable:
    """What tells a weight from others, and from itself as it was: its address, its version, and some of its values."""
    as_in_memory = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    values = weight.detach().permute(as_in_memory).reshape(-1)
    some = in_float64(values[:: max(len(values) // 1024, 1)])
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.dtype, weight.device, hash(some.cpu().numpy().tobytes())
