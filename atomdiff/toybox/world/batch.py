"""Batches of several tensors that are indexed, joined and moved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="Batch")


class Batch:
    """Base of frozen dataclasses whose fields are all tensors with the same first dimension."""

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(next(iter(self._tensors().values())))

    def __getitem__(self: B, index: Any) -> B:
        """Some of the batch, as a batch: an int gives a batch of one."""
        if isinstance(index, int):
            index = torch.tensor([range(len(self))[index]])
        if isinstance(index, Tensor):
            index = index.to(self.device)
        return type(self)(**{name: tensor[index] for name, tensor in self._tensors().items()})

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self._tensors().values())).device

    def to(self: B, device: str | torch.device) -> B:
        """The batch on another device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def repeat(self: B, count: int) -> B:
        """Each element `count` times in a row."""
        return type(self)(**{name: tensor.repeat_interleave(count, 0) for name, tensor in self._tensors().items()})

    @classmethod
    def cat(cls: type[B], batches: Sequence[B]) -> B:
        """Several batches as one."""
        names = batches[0]._tensors()
        return cls(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})


def groups(index: Tensor) -> list[tuple[int, Tensor]]:
    """The values of an index (n,) and, for each, the rows that have it; one round trip to the device in all."""
    kept = index.cpu()
    order = kept.argsort(stable=True)
    values, counts = kept.unique(return_counts=True)
    rows = order.to(index.device).split(counts.tolist())
    return list(zip(values.tolist(), rows, strict=True))
