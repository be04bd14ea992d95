"""Weight averages: what a run validates with and saves, in place of its last step, where it is asked for them.

The exponential moving average has the rising decay of diffusers' scripts; schedule-free AdamW has averages of its own:
Defazio et al., "The Road Less Scheduled", arXiv 2405.15682.
"""

from collections.abc import Iterable, Iterator
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
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    if moving_average is not None:
        moving_average.copy_to(parameters)
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
