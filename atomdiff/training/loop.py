"""What the training loops of concepts and of classifiers share."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atomdiff.training.sharding import whole

_LOSS_SHARE = 0.02  # of a step's loss in the average loss after it


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to its `initial_lr` times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def mean_over_processes(accelerator: Accelerator, loss: Tensor) -> float:
    """Return the mean of a scalar over all processes."""
    return float(accelerator.gather(loss.detach().reshape(1)).mean())


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_grad_norm: float) -> float:
    """Scale the gradients down to a norm of at most `max_grad_norm`, unless it is 0; return the norm that they had."""
    return float(whole(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)))


def update_average(average: float, loss: float) -> float:
    """Return the exponential moving average of the loss after one more step; it begins as NaN."""
    return loss if math.isnan(average) else average + (loss - average) * _LOSS_SHARE
