"""Settings of Mona."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.atoms.variant import check_count

_MAX_SIZES = 8


@dataclass
class MonaConfig(ActivationConfig):
    """Mona: y = x + up(dropout(gelu(z))), where z are few channels, mixed by depthwise convolutions of several sizes.

    Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
    arXiv 2311.15010.

    Raises:
        ValueError: a field has a value that it may not have.
    """

    METHOD: ClassVar[str] = "MONA"
    PRESET: ClassVar[str] = "blocks"

    hidden_size: int = field(default=64, metadata={"help": "Channels within an adapter."})
    kernel_sizes: list[int] = field(
        default_factory=lambda: [3, 5, 7], metadata={"help": "Sides of the depthwise convolutions, which are odd."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Share of the hidden channels that training leaves out."})

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()
        check_count("hidden_size", self.hidden_size)
        sizes = self.kernel_sizes
        are_odd = isinstance(sizes, (list, tuple)) and all(type(k) is int and k > 0 and k % 2 for k in sizes)
        if not are_odd or not 0 < len(sizes) <= _MAX_SIZES:
            raise ValueError(f"kernel_sizes={sizes!r:.100}: expected up to {_MAX_SIZES} odd numbers, such as [3, 5, 7]")
        self.kernel_sizes = list(sizes)
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a number from 0 to below 1")
