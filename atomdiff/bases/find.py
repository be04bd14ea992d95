"""Which base architecture a pipeline, a class of pipelines or a concept file is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atomdiff.bases.base import Base
from atomdiff.bases.other import OtherBase
from atomdiff.bases.sdxl import StableDiffusionXL
from atomdiff.bases.stable_diffusion import StableDiffusion

BASES: list[Base] = [StableDiffusionXL(), StableDiffusion()]
"""Those that can be trained; the first that matches counts."""
_OTHER = OtherBase()


def register_base(base: Base) -> None:
    """Add a base architecture, which is asked before those that are there."""
    BASES.insert(0, base)


def known_bases() -> str:
    """Return the names of those that can be trained, for messages."""
    return " or ".join(base.name for base in reversed(BASES))


def find_base(components: Mapping[str, Any]) -> Base:
    """Return the base architecture of a pipeline's components, `pipe.components`, or of some of them by name."""
    return next((base for base in BASES if base.matches(components)), _OTHER)


def denoiser_of(pipe: Any) -> Any:
    """Return the model of a pipeline that denoises."""
    return getattr(pipe, find_base(pipe.components).denoiser)


def base_of_class(pipeline_class: str) -> Base | None:
    """Return the base architecture whose pipelines have a class of this name; None: it cannot be trained."""
    return next((base for base in BASES if base.pipeline_class == pipeline_class), None)


def base_of_architecture(architecture: str) -> Base | None:
    """Return the base architecture that a concept file names as `stable-diffusion-v1/atoms`; None: it is not known."""
    name = architecture.partition("/")[0]
    return next((base for base in BASES if name in base.architectures), None)
