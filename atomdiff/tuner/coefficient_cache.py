"""Sparse coefficients of a layer's base weight, worked out when they are first needed and kept while they are valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Key = tuple[str, str]
"""Adapter, and name of its atoms."""
Sources = Callable[[Key], tuple[Tensor, Tensor]]
"""Gives the atoms and the weight that coefficients come from."""


class CoefficientCache:
    """Coefficients by adapter and atoms, each valid until its atoms or the weight change.

    Copies of a layer's structure share what is there, deep copies and pickles leave it out: it is as large as weights.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[Any, Tensor]] = {}

    def get(self, key: Key, sources: Sources, compute: Callable[[], Tensor], always_valid: bool = False) -> Tensor:
        """The coefficients, worked out where there are none, or unless `always_valid` none that are valid."""
        if key not in self._entries or not (always_valid or self._entries[key][0] == _state(sources(key))):
            coefficients = compute()
            self._entries[key] = _state(sources(key)), coefficients
        return self._entries[key][1]

    @contextmanager
    def kept(self, sources: Sources, fn: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[None]:
        """Keep what is valid before, or what `fn` makes of it, whatever happens to the atoms and the weight within."""
        valid = {
            key: coefficients for key, (state, coefficients) in self._entries.items() if state == _state(sources(key))
        }
        yield
        self._entries = {key: (_state(sources(key)), fn(coefficients)) for key, coefficients in valid.items()}

    def drop(self, adapter: str) -> None:
        """Drop those of an adapter."""
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] != adapter}

    def __len__(self) -> int:
        return len(self._entries)

    def __copy__(self) -> CoefficientCache:
        copied = CoefficientCache()
        copied._entries = dict(self._entries)
        return copied

    def __reduce__(self) -> Any:
        return CoefficientCache, ()


def _state(tensors: tuple[Tensor, Tensor]) -> Any:
    """What tells tensors from others, and from themselves as they were."""
    return [(tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors]
