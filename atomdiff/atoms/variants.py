"""The variants of the method: what is trained of a layer's atoms, one class each.

A variant is chosen by its fields of `AtomSettings`. To add one, write a subclass of `Atoms`, name it in `VARIANTS`, and
give `AtomSettings` its field; layers, files, reports and commands ask the class.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.layout import Block, View, fit_block
from atomdiff.atoms.update import recursive_delta, shared_delta
from atomdiff.atoms.variant import Atoms, check_count

if TYPE_CHECKING:
    from atomdiff.atoms.settings import AtomSettings
    from atomdiff.tuner.config import AtomConfig


@dataclass(frozen=True)
class JointAtoms(Atoms):
    """Blocks of channels with their kernels taken as one row, chosen by `joint`."""

    takes_blocks = True

    @classmethod
    def is_chosen(cls, config: AtomSettings) -> bool:
        """See `Atoms`."""
        return config.joint

    @classmethod
    def check(cls, config: AtomSettings) -> None:
        """See `Atoms`."""
        if not isinstance(config.joint, bool):
            raise ValueError(f"joint={config.joint!r}: expected true or false")
        if config.joint and max(config.channel_block, *config.channel_block_pattern.values(), 1) == 1:
            raise ValueError("joint=True with channel_block=1: there are no blocks to take whole; use 2 or more")

    @classmethod
    def label(cls, config: AtomSettings) -> str:
        """See `Atoms`."""
        return f"{super().label(config)} taken whole"


@dataclass(frozen=True)
class RecursiveAtoms(Atoms):
    """The paper's D = beta x D1, chosen by `recursion`: each input channel combines m1 trained atoms in its own way."""

    recursion: int
    """m1."""
    inputs: int
    """Input channels of a group."""

    parameter_names = ("recursion_delta", "recursion_mix")

    @classmethod
    def is_chosen(cls, config: AtomSettings) -> bool:
        """See `Atoms`."""
        return config.recursion is not None

    @classmethod
    def check(cls, config: AtomSettings) -> None:
        """See `Atoms`."""
        if config.recursion is not None:
            check_count("recursion", config.recursion)
            if config.joint:
                raise ValueError(
                    f"joint=True with recursion={config.recursion}: recursion decomposes the atoms of single kernels, "
                    "joint takes blocks of them as one; choose one of the two"
                )

    @classmethod
    def check_targets(cls, config: AtomSettings, layers: Mapping[str, Sequence[Atoms]]) -> None:
        """See `Atoms`."""
        if not any(isinstance(atoms, cls) for of_layer in layers.values() for atoms in of_layer):
            raise ValueError(
                f"recursion={config.recursion} decomposes kernels larger than 1x1, and none of the {len(layers)} "
                "matching layers has one: leave it out, or adapt convolutions"
            )

    @classmethod
    def label(cls, config: AtomSettings) -> str:
        """See `Atoms`."""
        return f"{super().label(config)}, recursion {config.recursion}"

    @classmethod
    def why_not_fitted(cls, config: AtomSettings) -> str:
        """See `Atoms`."""
        return f"recursion={config.recursion}: its atoms cannot be fitted by least squares; extract without recursion"

    @classmethod
    def of_kernels(cls, config: AtomSettings, view: View, weight_shape: Sequence[int], num_atoms: int) -> Atoms:
        """See `Atoms`."""
        assert config.recursion is not None
        view = replace(view, by_input=True)
        return cls("atom", view, view.axes(weight_shape), num_atoms, config.recursion, weight_shape[1])

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Atoms`."""
        return {
            "recursion_delta": (self.num_atoms, self.recursion, self.size),
            "recursion_mix": (self.inputs, self.num_atoms, self.recursion),
        }

    def initial_tensors(self, config: AtomConfig, seed: int) -> dict[str, Tensor]:
        """See `Atoms`; the mix is random in any case."""
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(self.parameter_shapes()["recursion_mix"], generator=generator) / self.recursion**0.5
        return super().initial_tensors(config, seed) | {"recursion_mix": mix}

    @property
    def delta_name(self) -> str:
        """See `Atoms`."""
        return "recursion_delta"

    def delta(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """See `Atoms`."""
        return recursive_delta(tensor("recursion_mix"), tensor("recursion_delta"))

    @classmethod
    def deltas(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Atoms`."""
        deltas = super().deltas(tensors)
        if "recursion_delta" in deltas:  # not in layers without a kernel
            deltas["recursion_delta"] = recursive_delta(tensors["recursion_mix"], tensors["recursion_delta"])
        return deltas


@dataclass(frozen=True)
class SharedAtoms(Atoms):
    """Deltas of one set of directions E (n, m, d) for all layers of a kind: dD_l = sum over k of a_lk * E_k.

    Chosen by `share`; the idea of FINE, arXiv 2409.19289, where the layers of a kind share their singular vectors.
    """

    share_count: int
    """n."""

    parameter_names = ("atom_mix", "atom_shared", "channel_mix", "channel_shared")
    shared_names = ("atom_shared", "channel_shared")
    only_kernels = False

    @classmethod
    def is_chosen(cls, config: AtomSettings) -> bool:
        """See `Atoms`."""
        return config.share is not None

    @classmethod
    def check(cls, config: AtomSettings) -> None:
        """See `Atoms`."""
        check_count("share_count", config.share_count)
        if config.share not in (None, "kind"):
            raise ValueError(f"share={config.share!r}: expected 'kind' or None")
        if config.share is None:
            return
        if config.basis != "dct":
            raise ValueError(
                f"share={config.share!r} with basis={config.basis!r}: atoms that are fitted to each weight mean "
                "something else in each layer; use basis='dct'"
            )
        for other in ("joint", "recursion", "pruned"):
            if getattr(config, other):
                raise ValueError(
                    f"share={config.share!r} with {other}={getattr(config, other)!r}: choose one of the two"
                )

    @classmethod
    def label(cls, config: AtomSettings) -> str:
        """See `Atoms`."""
        return f"{super().label(config)}, {config.share_count} directions for each kind of layer"

    @classmethod
    def of_kernels(cls, config: AtomSettings, view: View, weight_shape: Sequence[int], num_atoms: int) -> Atoms:
        """See `Atoms`."""
        return cls("atom", view, view.axes(weight_shape), num_atoms, config.share_count)

    @classmethod
    def of_channels(cls, config: AtomSettings, view: View) -> Atoms:
        """See `Atoms`."""
        return cls("channel", view, view.block, math.prod(view.block), config.share_count)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Atoms`."""
        count = self.share_count
        return {f"{self.name}_mix": (count,), f"{self.name}_shared": (count, self.num_atoms, self.size)}

    def initial_tensors(self, config: AtomConfig, seed: int) -> dict[str, Tensor]:
        """See `Atoms`; the mix is random in any case, and gives the directions a gradient while they are zero."""
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(self.share_count, generator=generator) / self.share_count**0.5
        return super().initial_tensors(config, seed) | {f"{self.name}_mix": mix}

    def delta(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """See `Atoms`."""
        return shared_delta(tensor(f"{self.name}_mix"), tensor(f"{self.name}_shared"))

    @classmethod
    def deltas(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Atoms`."""
        names = [kind.removesuffix("_mix") for kind in tensors if kind.endswith("_mix")]
        return {f"{name}_delta": shared_delta(tensors[f"{name}_mix"], tensors[f"{name}_shared"]) for name in names}


VARIANTS: tuple[type[Atoms], ...] = (JointAtoms, RecursiveAtoms, SharedAtoms, Atoms)
"""All variants; a config means the first that it chooses."""

PARAMETER_NAMES = tuple(dict.fromkeys(name for variant in reversed(VARIANTS) for name in variant.parameter_names))
BASIS_NAMES = ("atom_basis", "channel_basis")
TENSOR_NAMES = PARAMETER_NAMES + BASIS_NAMES
"""Names of an adapter's tensors in files: trained ones, then atoms."""
SCORE_NAME = "select_score"
"""Name of a layer's score (1,) with `select="adaptive"`, which is trained but in no concept file."""
SCORE_START, SCORE_THRESHOLD = 0.15, 0.1
"""A layer acts while its score is at least the threshold."""


def variant_of(config: AtomSettings) -> type[Atoms]:
    """The variant that a config chooses."""
    return next(variant for variant in VARIANTS if variant.is_chosen(config))


def atoms_of(config: AtomSettings, module_name: str, weight_shape: Sequence[int]) -> tuple[Atoms, ...]:
    """The atoms of one layer: of its kernels (or whole blocks), and of its channel blocks.

    A layer without a kernel has only the latter; if it has no blocks either, one number that scales its weight.

    Raises:
        ValueError: `config.num_atoms` exceeds the numbers in a row, which only an overcomplete basis allows.
    """
    block = fit_block(weight_shape, config.block_of(module_name))
    has_kernel = math.prod(weight_shape[2:]) > 1
    variant = variant_of(config)
    if not has_kernel and variant.only_kernels:
        variant = Atoms
    atom_sets = []
    if has_kernel or block == (1, 1):
        view = View(block if variant.takes_blocks else (1, 1))
        num_atoms = _num_atoms(config, module_name, view.block, view.axes(weight_shape)) if has_kernel else 1
        atom_sets.append(variant.of_kernels(config, view, weight_shape, num_atoms))
    if block != (1, 1) and not variant.takes_blocks:
        view = View(block, spans_kernel=False)
        atom_sets.append(variant.of_channels(config, view))
    if config.kept_atoms is None:
        return tuple(atom_sets)
    kept = config.kept_atoms[module_name]
    return tuple(replace(a, num_atoms=min(kept[a.name], a.num_atoms)) for a in atom_sets if a.name in kept)


def stored_atoms(
    config: AtomSettings, module_name: str, tensors: Mapping[str, Tensor], weight_shape: Sequence[int]
) -> tuple[Atoms, ...]:
    """As `atoms_of`, of a layer in a file: pruned ones have as many atoms as their tensors."""
    if config.pruned:
        config = copy.copy(config)
        config.kept_atoms = {module_name: kept_atoms(tensors)}
    return atoms_of(config, module_name, weight_shape)


def kept_atoms(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name of atoms -> how many of them a layer has, by its tensors; as many as it can have where they do not say."""
    counts = {"channel" if kind.startswith("channel") else "atom": sys.maxsize for kind in tensors}
    bases = {name: tensors[f"{name}_basis"] for name in counts if f"{name}_basis" in tensors}
    return counts | {name: (*basis.shape, 0)[0] for name, basis in bases.items()}


def _num_atoms(config: AtomSettings, module_name: str, block: Block, axes: Sequence[int]) -> int:
    size = math.prod(axes)
    num_atoms = config.num_atoms or size
    if num_atoms > size and not ATOM_BASES[config.basis].is_overcomplete:
        row = "the kernel" if block == (1, 1) else f"a block of {block[0]} x {block[1]} kernels"
        raise ValueError(
            f"num_atoms={num_atoms}, but {row} of {module_name} has only {size} elements: "
            f"use at most {size}, or None for all; more need basis='sparse'"
        )
    return num_atoms
