"""A copy of a model with all tensors in memory, wherever the model keeps them between calls."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from atomdiff.tuner.checks import check_in_reach
from atomdiff.tuner.dry_run import copy_structure
from atomdiff.tuner.weight_access import put_in_memory

_Module = TypeVar("_Module", bound=nn.Module)


def readable_copy(model: _Module) -> _Module:
    """A copy as `copy_structure` makes it, which shares the memory of all tensors, of a model that may be offloaded.

    Raises:
        UserError: some of its tensors are out of reach.
    """
    check_in_reach(model)
    copied = copy_structure(model)
    put_in_memory(copied)
    return copied
