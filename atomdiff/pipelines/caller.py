"""Which pipeline calls a model: several share it, each with a scheduler and guidance of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Caller:
    """A pipeline that is calling a model."""

    pipe: Any
    """The pipeline."""
    latents: int | None
    """How many latents it makes, one an image, before guidance makes groups of them; None: that cannot be seen."""


def find_caller(model: nn.Module) -> Caller | None:
    """The pipeline in whose call this is called, if the model is one of its parts; None: the model is called directly.

    Hooks are given the model alone, and pipelines do not say that they begin. While one of diffusers generates, its
    latents are in the variable `latents`.
    """
    from diffusers import DiffusionPipeline

    frame: FrameType | None = sys._getframe(1)
    pipe = None
    while frame is not None:
        variables = frame.f_locals
        owner = variables.get("self")
        if pipe is None and isinstance(owner, DiffusionPipeline) and _has_part(owner, model):
            pipe = owner
        if pipe is not None and owner is pipe and isinstance(variables.get("latents"), Tensor):
            return Caller(pipe, len(variables["latents"]))
        frame = frame.f_back
    return None if pipe is None else Caller(pipe, None)


def _has_part(pipe: Any, model: nn.Module) -> bool:
    return any(part is model or getattr(part, "_orig_mod", None) is model for part in pipe.components.values())
