"""Switch all adapters of a model off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute without its adapters, whatever PEFT method they are of; nothing else about them changes.

    PEFT's and diffusers' own calls would also freeze their parameters, and unfreeze more than was trained.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
