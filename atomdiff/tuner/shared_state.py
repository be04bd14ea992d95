"""Tensors that all layers of an adapter share, such as VeRA's projections and UniLoRA's vector.

PEFT keeps them in the tuner around the model. Here there is no such thing around a model: its layers keep them.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

_MARK = "shared_as"  # an attribute of what is shared: its name in the tuner


def share_state(tuner: Any, model: nn.Module) -> None:
    """Let an adapter that is about to be added share tensors with the layers of others of its method.

    PEFT's tuner would put its own in their place, and the others would lose theirs.
    """
    there = shared_state(model)
    for name, added in list(tuner.named_children()):
        if name == "model":
            continue
        vars(added)[_MARK] = name
        if (kept := there.get(name)) is not None:
            for adapter in added:
                kept[adapter] = added[adapter]
            setattr(tuner, name, kept)


def is_shared(tuner: Any, model: nn.Module) -> bool:
    """Tell whether all that a tuner holds is in the layers of a model, too, once it has added an adapter."""
    return {name for name, _ in tuner.named_children()} - {"model"} <= shared_state(model).keys()


def shared_state(model: nn.Module) -> dict[str, Any]:
    """Return what layers of a model share, by its name in PEFT's tuner; each holds tensors by adapter."""
    return {vars(module)[_MARK]: module for module in model.modules() if _MARK in vars(module)}


def as_peft_model(model: Any) -> nn.Module:
    """Return a model wrapped as in a `PeftModel`, so that PEFT finds all tensors of an adapter where it expects them.

    The model itself stays as it is.
    """
    wrapped: Any = nn.Module()
    wrapped.base_model, wrapped.peft_config = _Tuner(model), model.peft_config
    return wrapped


class _Tuner(BaseTuner):  # type: ignore[misc]
    """What is around a model in a `PeftModel`, without adding adapters."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        for name, container in shared_state(model).items():
            self.add_module(name, container)

    def _create_and_replace(self, *_: Any) -> None:
        raise NotImplementedError
