"""Means with standard errors, over prompts and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far from it the mean of other prompts and seeds may be."""

    mean: float
    """Mean over all values."""
    standard_error: float | None
    """Standard error of the mean; None: there is one value only."""
    count: int
    """Number of values."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.standard_error:.3f}" if self.standard_error is not None else "")


def estimate(values: Tensor) -> Estimate:
    """Return the mean of values with its standard error.

    Images of one prompt are more alike than those of different prompts, so prompts are what is counted: the error is
    that of the mean of the prompts' means. Of one prompt it is that over its images.

    Args:
        values: one for each image (prompts, images), or one for each prompt (prompts, 1); finite.

    Raises:
        ValueError: there are no values, or they are not finite.
    """
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"found values of shape {tuple(values.shape)}; expected (prompts, images), at least one")
    values = values.double()
    if not values.isfinite().all():
        raise ValueError(f"found {int((~values.isfinite()).sum())} values that are not finite; expected none")
    groups = values.mean(1) if len(values) > 1 else values[0]
    error = float(groups.std()) / math.sqrt(len(groups)) if len(groups) > 1 else None
    return Estimate(float(values.mean()), error, values.numel())
