"""Settings of the filter-atom tuner."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from atomdiff.tuner.atom_basis import ATOM_BASES
from atomdiff.tuner.peft_type import ATOMS
from atomdiff.tuner.variant import check_count
from atomdiff.tuner.variants import VARIANTS
from atomdiff.utils.sizes import parse_bytes
from atomdiff.utils.untrusted import check_patterns

PRESETS = ("conv", "conv+proj", "attention", "cross_attention", "all")

_NOT_SHAPING = {
    "seed",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_weights",
    "select",
    "select_penalty",
    "select_budget",
}
_MAX_SPARSITY = 1e30  # what float32 can hold a multiple of


@dataclass
class AtomConfig(PeftConfig):
    """Filter-atom tuning: W seen as rows X = A @ D + residual becomes X + A @ dD, and only dD is trained.

    Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

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
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: 'conv' (kernels larger than 1x1; the default), 'conv+proj' (1x1 convolutions "
            "and Linear proj_in and proj_out, too), 'attention' (its Linear projections), 'cross_attention' (those "
            "of attention to another sequence), 'all' (every layer that atoms can adapt), a list of names or endings, "
            "or a regular expression of the whole name."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Layers to leave out: a list of names or endings, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Adapt only layers of these indexes, as PEFT counts them: see layers_pattern."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in, such as 'layers'."}
    )
    select: Literal["all", "adaptive"] = field(
        default="all",
        metadata={
            "help": "Which of the target layers stay: 'all', or 'adaptive', those whose score, trained with the atoms, "
            "is at least 0.1; the others leave the concept file."
        },
    )
    select_penalty: float = field(
        default=0.01,
        metadata={
            "help": "With select='adaptive': what the mean of the layers' scores adds to the loss of a training run, "
            "times this. With more, fewer layers stay."
        },
    )
    select_budget: str | int | None = field(
        default=None,
        metadata={
            "help": "With select='adaptive': bytes that the concept file may have, such as '8KB'. From half of the "
            "steps on, only the layers with the highest scores that fit are trained."
        },
    )
    pruned: bool = field(
        default=False,
        metadata={
            "help": "In files of `atomdiff prune`: layers have as many atoms as their tensors, and may lack those of "
            "kernels or of channels. Has no effect on training."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained and saved whole beside the atoms, such as a new head."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start with deltas of zero, so without an effect; False: with random ones, for tests. Atoms are "
            "fitted in any case."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.filled_by_loader = False  # True: atoms and deltas are zeros until a loader fills them in; never stored
        # Of a pruned file: module -> name of atoms -> how many of them there are; never stored.
        self.kept_atoms: Mapping[str, Mapping[str, int]] | None = None
        self._check_kinds()
        self.peft_type = ATOMS
        self.channel_block_pattern = self.channel_block_pattern or {}
        if self.target_modules is None:
            self.target_modules = "conv"
        elif not isinstance(self.target_modules, str):
            self.target_modules = sorted(self.target_modules)
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = sorted(self.exclude_modules)
        self._check_values()
        self._check_combinations()

    def block_of(self, module_name: str) -> int:
        """The channel block asked for at the module of this name."""
        key = get_pattern_key(list(self.channel_block_pattern), module_name)
        return self.channel_block_pattern.get(key, self.channel_block)

    @property
    def budget(self) -> int | None:
        """Bytes that a concept file may have; None: any number."""
        return None if self.select_budget is None else parse_bytes(self.select_budget, "select_budget")

    @property
    def stores_basis(self) -> bool:
        """Whether files carry the atoms beside their deltas: all but the DCT's depend on the weight."""
        return ATOM_BASES[self.basis].is_stored

    def shaping(self) -> dict[str, Any]:
        """The settings that the shapes and the meaning of deltas follow from."""
        own = {each.name for each in fields(self)} - {each.name for each in fields(PeftConfig)} - _NOT_SHAPING
        return {name: getattr(self, name) for name in sorted(own)}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, the same for every run."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def _check_kinds(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            if not _are(str, getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a name or a list of names")
        if not _are(int, self.layers_to_transform):
            raise ValueError(f"layers_to_transform={self.layers_to_transform!r}: expected a number or a list of them")
        for name in ("init_weights", "pruned"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected true or false")
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
        if self.select not in ("all", "adaptive"):
            raise ValueError(f"select={self.select!r}: expected 'all' or 'adaptive'")
        if type(self.select_penalty) not in (int, float) or not 0 <= self.select_penalty < math.inf:
            raise ValueError(f"select_penalty={self.select_penalty!r}: expected a number of at least 0, such as 0.01")
        if self.select_budget is not None:
            parse_bytes(self.select_budget, "select_budget")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed!r}: expected a whole number from 0 to 2**32 - 1")

    def _check_combinations(self) -> None:
        for variant in VARIANTS:
            variant.check(self)
        if self.select_budget is not None and self.select != "adaptive":
            raise ValueError(
                f"select_budget={self.select_budget!r} with select={self.select!r}: layers leave for a budget only "
                "with select='adaptive'; a file of all layers can be made smaller by `atomdiff prune`"
            )
        if self.layers_to_transform is not None and not (
            isinstance(self.target_modules, list) or self.target_modules in PRESETS
        ):
            raise ValueError(
                f"layers_to_transform with target_modules={self.target_modules!r}: a regular expression itself chooses "
                "the layers; use a list of names or one of the presets " + ", ".join(PRESETS)
            )


def _are(kind: type, value: Any) -> bool:
    """Whether a value is of this type, or a collection of such values, or None."""
    values = value if isinstance(value, (list, tuple, set, range)) else [] if value is None else [value]
    return all(type(each) is kind for each in values)
