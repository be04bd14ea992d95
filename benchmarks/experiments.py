"""The methods in configs/experiments, and the learning rates at which a comparison tries each."""

from __future__ import annotations

from pathlib import Path

import yaml

EXPERIMENTS = Path(__file__).parents[1] / "configs" / "experiments"


def own_rate(method: str) -> float:
    """Return the learning rate that stands beside the adapter of a method, a folder in configs/experiments."""
    return float(yaml.safe_load((EXPERIMENTS / method / "overrides.yaml").read_text())["learning_rate"])


def rates_around(rate: float, trials: int, factor: float) -> list[float]:
    """Return the learning rates of 1, 2 or 3 trials: `rate`, and that divided and multiplied by `factor`."""
    return [[rate], [rate / factor, rate], [rate / factor, rate, rate * factor]][trials - 1]
