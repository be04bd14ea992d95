"""What of a run saves memory or time and leaves its result as it is, but for rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, NeedsPackage

_ATTENTION = ("plain_attention", "enable_xformers_memory_efficient_attention", "enable_attention_slicing")
_QUANTIZED = ("load_in_8bit", "load_in_4bit")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(ConfigGroup):
    """Memory and speed."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower steps."""
    allow_tf32: bool = False
    """Allow TF32 matrix products on NVIDIA GPUs (Ampere and later): faster, with slightly less precision."""
    plain_attention: bool = False
    """Compute attention without PyTorch's fused kernel: faster for small images on a CPU, but takes more memory."""
    enable_xformers_memory_efficient_attention: Annotated[bool, NeedsPackage("xformers", "gpu")] = False
    """Use the memory-efficient attention of xformers, which must be installed; needs a GPU."""
    enable_attention_slicing: bool = False
    """Compute attention in slices of half of the heads: less memory where PyTorch has no memory-efficient kernel, but
    slower."""
    load_in_8bit: Annotated[bool, NeedsPackage("bitsandbytes", "gpu")] = False
    """Quantize the frozen Linear layers of the UNet to 8 bits; needs bitsandbytes."""
    load_in_4bit: Annotated[bool, NeedsPackage("bitsandbytes", "gpu")] = False
    """Quantize the frozen Linear layers of the UNet to 4 bits (NF4); needs bitsandbytes."""

    def check(self) -> None:
        """Check that there is one attention and one quantization at most."""
        for names in (_ATTENTION, _QUANTIZED):
            given = [name for name in names if getattr(self, name)]
            if len(given) > 1:
                raise UserError(f"found {' and '.join(given)}: expected at most one of them")
