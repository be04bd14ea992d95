"""What a caller asks the engine for: one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from atomdiff.sampling.config import Side
from atomdiff.serving.schedulers import SCHEDULERS
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, Range

MAX_PROMPT = 10_000
"""Characters of a prompt with its tags; text encoders read a few hundred."""


@dataclass(frozen=True)
class ImageRequest(ConfigGroup):
    """One image.

    Raises:
        UserError: a field has a value that cannot be used; the message names field, value and what is allowed.
    """

    prompt: str
    """Prompt, with tags such as `<atoms:NAME:0.8>` for concepts of the library."""
    negative_prompt: str | None = None
    """Negative prompt."""
    seed: Annotated[int, Range(0, below=2**64)] = 0
    """Seed of the noise."""
    num_inference_steps: Annotated[int, Range(1, 500)] = 30
    """Number of denoising steps."""
    guidance_scale: Annotated[float, Range(0, 1000)] = 7.5
    """Scale of classifier-free guidance; 1 turns it off."""
    height: Side | None = None
    """Height in pixels, a multiple of 8. Default: that of the base model."""
    width: Side | None = None
    """Width in pixels, a multiple of 8. Default: that of the base model."""
    concepts: Mapping[str, Any] = field(default_factory=dict)
    """Further concepts: name in the library -> adapter weight, as tags have it. A tag of the same name goes first."""
    scheduler: str | None = None
    """Scheduler, one of `SCHEDULERS`. Default: that of the base model, or as the concepts were trained."""

    def check(self) -> None:
        """Check that the scheduler is known, and that reading the prompts does not keep others waiting."""
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(self, name) or "")) > MAX_PROMPT:
                raise UserError(f"{name}: found {length} characters; expected at most {MAX_PROMPT}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise UserError(f"scheduler={self.scheduler!r}: expected one of {', '.join(SCHEDULERS)}, or none")
