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

    Hooks of a model are told of the model alone, and pipelines do not say that they begin. Every pipeline of diffusers
    has its latents in the variable `latents` meanwhile.
    """
    from diffusers import DiffusionPipeline

    frame: FrameType | None = sys._getframe(1)
    pipe = None
    while frame is not None:
        names = frame.f_locals
        found = names.get("self")
        if pipe is None and isinstance(found, DiffusionPipeline) and _has_part(found, model):
            pipe = found
        if pipe is not None and found is pipe and isinstance(names.get("latents"), Tensor):
            return Caller(pipe, len(names["latents"]))
        frame = frame.f_back
    return None if pipe is None else Caller(pipe, None)


def _has_part(pipe: Any, model: nn.Module) -> bool:
    return any(getattr(part, "_orig_mod", part) is model for part in pipe.components.values())
