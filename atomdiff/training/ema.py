"""Models as they are validated and saved: weight averages, and evaluation mode for a while.

Weight averages are what a run validates with and saves, in place of its last step, where it is asked for them.

The exponential moving average has the rising decay of diffusers' scripts; schedule-free AdamW has averages of its own:
Defazio et al., "The Road Less Scheduled", arXiv 2405.15682.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch import nn


@contextmanager
def averaged(
    parameters: Iterable[nn.Parameter], optimizer: AcceleratedOptimizer, moving_average: EMAModel | None
) -> Iterator[None]:
    """Give the parameters their averages for a while, if there are any; afterwards every bit is as before."""
    if moving_average is None and not hasattr(optimizer.optimizer, "eval"):
        yield
        return
    parameters = list(parameters)
    with restored(parameters):
        optimizer.eval()
        if moving_average is not None:
            moving_average.copy_to(parameters)
        try:
            yield
        finally:
            optimizer.train()


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give parameters back the values that they had before a `with` block, to the bit."""
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode for a while."""
    models = [model for model in models if model.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train()
