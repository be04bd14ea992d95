"""Settings that the shapes and the meaning of a concept's deltas follow from; no more than a file needs to be read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.variant import check_count
from atomdiff.atoms.variants import VARIANTS
from atomdiff.utils.untrusted import check_patterns

_MAX_SPARSITY = 1e30  # what float32 can hold a multiple of


@dataclass
class AtomSettings:
    """What the deltas of a concept are; `AtomConfig` adds which layers they are for and how they are trained.

    Raises:
        ValueError: a field has a value it may not have, or two fields contradict each other.
    """

    num_atoms: int | None = field(
        default=None,
        metadata={
            "help": "Atoms per kernel (of each block with joint=True); None: as many as it has elements. More "
            "need basis='sparse'. Has no effect on layers without a kernel."
        },
    )
    channel_block: int = field(
        default=4,
        metadata={
            "help": "Side of the channel blocks that are mixed besides the kernel, in channels; 1: none. "
            "Where it does not divide a channel count, that side's block is 1."
        },
    )
    channel_block_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Exceptions to channel_block: regular expression on the end of a module name -> side."},
    )
    joint: bool = field(
        default=False,
        metadata={
            "help": "Take a block of channels with its kernels as one row of p*q*k*l elements, instead of mixing "
            "kernel positions and channels separately."
        },
    )
    recursion: int | None = field(
        default=None,
        metadata={
            "help": "m1: each input channel gets atoms of its own, combinations of m1 trained ones (the paper's D = "
            "beta x D1); None: all input channels share their atoms. Acts on kernels larger than 1x1."
        },
    )
    share: Literal["kind"] | None = field(
        default=None,
        metadata={
            "help": "'kind': all layers whose atoms have the same shape mix their deltas from one set of trained "
            "directions, each with a few numbers of its own. Needs basis='dct', whose atoms mean the same in each."
        },
    )
    share_count: int = field(default=4, metadata={"help": "Directions of each kind of layer with share='kind'."})
    basis: Literal["svd", "dct", "sparse"] = field(
        default="svd",
        metadata={
            "help": "Atoms: 'svd' fitted to each weight, 'dct' the same for all (not stored), or the paper's 'sparse', "
            "learned so that few of them make up a row; keeps coefficients as large as the weights."
        },
    )
    sparsity: float = field(
        default=1e-3, metadata={"help": "Weight of the L1 norm of the coefficients with basis='sparse'."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the recursion's combinations and of sparse atoms."})
    pruned: bool = field(
        default=False,
        metadata={
            "help": "In files of `atomdiff prune`: layers have as many atoms as their tensors, and may lack those of "
            "kernels or of channels. Has no effect on training."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        self.filled_by_loader = False  # True: atoms and deltas are zeros until a loader fills them in; never stored
        # Of a pruned file: module -> name of atoms -> how many of them there are; never stored.
        self.kept_atoms: Mapping[str, Mapping[str, int]] | None = None
        self._check_kinds()
        self.channel_block_pattern = self.channel_block_pattern or {}
        self._check_values()
        for variant in VARIANTS:
            variant.check(self)

    def block_of(self, module_name: str) -> int:
        """The channel block asked for at the module of this name; patterns match its end, as in PEFT."""
        for pattern, block in self.channel_block_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module_name):
                return block
        return self.channel_block

    @property
    def stores_basis(self) -> bool:
        """Whether files carry the atoms beside their deltas: all but the DCT's depend on the weight."""
        return ATOM_BASES[self.basis].is_stored

    def shaping(self) -> dict[str, Any]:
        """The settings that the shapes and the meaning of deltas follow from."""
        return {name: getattr(self, name) for name in sorted(SETTINGS - {"seed"})}

    def _check_kinds(self) -> None:
        if not isinstance(self.pruned, bool):
            raise ValueError(f"pruned={self.pruned!r}: expected true or false")
        pattern = self.channel_block_pattern
        if pattern and not (isinstance(pattern, dict) and all(isinstance(key, str) for key in pattern)):
            raise ValueError(f"channel_block_pattern={pattern!r}: expected regular expressions with a number each")

    def _check_values(self) -> None:
        check_count("channel_block", self.channel_block)
        if self.num_atoms is not None:
            check_count("num_atoms", self.num_atoms)
        for name, block in self.channel_block_pattern.items():
            check_count(f"channel_block_pattern[{name!r}]", block)
        check_patterns(self.channel_block_pattern)
        for pattern in self.channel_block_pattern:
            try:
                re.compile(f"({pattern})$")  # as it is used
            except re.error as error:
                raise ValueError(f"channel_block_pattern: {pattern!r} is not a regular expression: {error}") from error
        if self.basis not in ATOM_BASES:
            raise ValueError(f"basis={self.basis!r}: expected one of {', '.join(ATOM_BASES)}")
        if type(self.sparsity) not in (int, float) or not 0 < self.sparsity <= _MAX_SPARSITY:
            raise ValueError(f"sparsity={self.sparsity!r}: expected a number above 0, such as 1e-3")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed!r}: expected a whole number from 0 to 2**32 - 1")


SETTINGS = frozenset(each.name for each in fields(AtomSettings))
"""Names of all settings."""
