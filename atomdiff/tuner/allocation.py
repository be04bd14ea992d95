"""Trying out what settings from a file make of a model, whatever amount of memory they ask for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MOST_NUMBERS = 1 << 28  # 1 GiB in float32: no layer's adapter has a tensor as large
_MAKERS = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.zeros,
)


class _Limit(TorchFunctionMode):
    """Refuses to make tensors that no adapter has, before there is memory for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            made = func(*args, **kwargs | {"device": "meta"})
            if made.numel() > _MOST_NUMBERS:
                raise ValueError(
                    f"its settings ask for a tensor {tuple(made.shape)}, expected at most {_MOST_NUMBERS:,} numbers: "
                    "check its rank, or copy or download it again"
                )
        return func(*args, **kwargs)


@contextmanager
def trial() -> Iterator[None]:
    """Within, an adapter can be added without a warning or a change of the random numbers to come.

    Raises:
        ValueError: it has tensors of absurd sizes.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _Limit():
        warnings.simplefilter("ignore")
        yield
