"""Settings of the filter-atom tuner."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

PRESETS = ("conv", "attention", "all")
BASES = ("svd", "dct")


@dataclass
class AtomConfig(PeftConfig):
    """Filter-atom tuning: W seen as rows X = A @ D + residual becomes X + A @ dD, and only dD is trained.

    Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

    Raises:
        ValueError: a field has a value it may not have.
    """

    num_atoms: int | None = field(
        default=None,
        metadata={"help": "Atoms per kernel, 1 to k*l; None: all. Has no effect on layers without a kernel."},
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
    basis: Literal["svd", "dct"] = field(
        default="svd", metadata={"help": "Atoms: 'svd' fitted to each weight, or 'dct', the same for all (not stored)."}
    )
    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: 'conv' (kernels larger than 1x1; the default), 'attention' (its Linear "
            "projections), 'all' (both), a list of names or endings, or a regular expression of the whole name."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Layers to leave out: a list of names or endings, or a regular expression."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Fit the atoms when the adapter is added; False only where a loader fills them in."},
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        from atomdiff.tuner.register import register

        self.peft_type = register()
        counts = {"channel_block": self.channel_block}
        counts |= {f"channel_block_pattern[{name!r}]": block for name, block in self.channel_block_pattern.items()}
        if self.num_atoms is not None:
            counts["num_atoms"] = self.num_atoms
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r}: expected a whole number of at least 1")
        for pattern in self.channel_block_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"channel_block_pattern: {pattern!r} is no regular expression: {error}") from error
        if self.basis not in BASES:
            raise ValueError(f"basis={self.basis!r}: expected one of {', '.join(BASES)}")
        if self.target_modules is None:
            self.target_modules = "conv"
        elif not isinstance(self.target_modules, str):
            self.target_modules = sorted(self.target_modules)
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = sorted(self.exclude_modules)

    def block_of(self, module_name: str) -> int:
        """The channel block asked for at the module of this name."""
        key = get_pattern_key(list(self.channel_block_pattern), module_name)
        return self.channel_block_pattern.get(key, self.channel_block)

    def shaping(self) -> tuple[Any, ...]:
        """The settings that the shapes and the meaning of deltas follow from."""
        return self.num_atoms, self.channel_block, self.channel_block_pattern, self.basis

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, the same for every run."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
