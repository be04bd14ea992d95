"""Settings of Conv-Adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.atoms.variant import check_count

BLOCKS = "blocks"
PLACEMENTS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


@dataclass
class ConvAdapterConfig(ActivationConfig):
    """Conv-Adapter: y = conv(x) + scale * pointwise(relu(grouped(x))), of which the last term is trained.

    Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv 2208.07463.

    Raises:
        ValueError: a field has a value that it may not have.
    """

    METHOD: ClassVar[str] = "CONV_ADAPTER"
    PRESET: ClassVar[str] = "conv"

    reduction: int = field(
        default=4,
        metadata={
            "help": "Input channels to each channel within the branch (the paper's gamma); where it does not divide "
            "their number, the next number above that does."
        },
    )
    placement: str = field(
        default="conv_parallel",
        metadata={
            "help": "What a branch is added to, a convolution's output ('conv') or a whole residual block's "
            "('residual'), and what it takes: the input of that ('parallel') or its output ('sequential'). One of "
            "'conv_parallel', 'conv_sequential', 'residual_parallel' and 'residual_sequential'."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        if self.placement not in PLACEMENTS:
            expected = ", ".join(map(repr, PLACEMENTS))
            raise ValueError(f"placement={self.placement!r:.100}: expected one of {expected}")
        super().__post_init__()
        check_count("reduction", self.reduction)
        if self.target_modules in (self.PRESET, BLOCKS) and self.target_modules != self.preset:
            raise ValueError(
                f"target_modules={self.target_modules!r}: with placement={self.placement!r} expected {self.preset!r}, "
                "a list of names or a regular expression"
            )

    @property
    def preset(self) -> str:
        """The `target_modules` that stands for all modules that the placement is meant for."""
        return BLOCKS if self.adapts_blocks else self.PRESET

    @property
    def adapts_blocks(self) -> bool:
        """Whether branches go with whole residual blocks."""
        return self.placement.startswith("residual")

    @property
    def takes_output(self) -> bool:
        """Whether branches take the output of what they go with, not its input."""
        return self.placement.endswith("sequential")
