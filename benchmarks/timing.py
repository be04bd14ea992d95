"""Wall times of calls."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the wall time of a call, on a GPU until it has computed."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def take_turns(
    works: Mapping[Name, Callable[[], Any]], repeats: int, device: str = "cpu", warm_up: int = 0
) -> dict[Name, float]:
    """Return the median seconds of each of some calls, which take turns, in an order drawn anew for every round.

    So each finds memory and caches as any other left them, and what else the machine does meets all alike.

    Args:
        works: the calls by name.
        repeats: rounds that count.
        device: where they compute.
        warm_up: rounds before those.
    """
    order = random.Random(0)
    measured: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(warm_up + repeats):
        for name in order.sample(list(works), len(works)):
            measured[name].append(seconds(works[name], device))
    return {name: statistics.median(times[warm_up:]) for name, times in measured.items()}
