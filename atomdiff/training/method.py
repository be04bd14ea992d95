"""The method of a run: read the adapter of the text encoders, and add adapters to models."""

import copy
import dataclasses
from typing import Any

import torch
from peft import PeftConfig

import atomdiff.activation_adapters  # noqa: F401 - PEFT knows its methods from then on
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.inject import inject
from atomdiff.tuner.read_config import adapts_nothing, read_adapter
from atomdiff.tuner.selection import file_budget
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed, fork_rng

ADAPTER_NAME = "default"


def read_text_adapter(text_adapter: str | None, adapter: PeftConfig | None) -> PeftConfig | None:
    """Read the config of the PEFT method for the text encoders; None is full tuning.

    Args:
        text_adapter: As `read_adapter` takes it. None: full tuning with that of the UNet, else atoms on the attention,
            with the UNet's settings if that has atoms too, since one file holds both.
        adapter: The method for the UNet.

    Raises:
        UserError: It cannot be read, or cannot be saved together with the UNet's.
    """
    if text_adapter is None:
        if adapter is None:
            return None
        atoms = adapter if isinstance(adapter, AtomConfig) else AtomConfig()
        everywhere: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        return dataclasses.replace(atoms, target_modules="attention", modules_to_save=None, **everywhere)
    text = read_adapter(text_adapter)
    what = f"text_encoder_adapter={text_adapter!r}"
    if (text is None) != (adapter is None):
        raise UserError(f"{what}: expected adapters for both the UNet and the text encoders, or full tuning of both")
    if adapts_nothing(text):
        raise UserError(f"{what}: trains nothing; expected train_text_encoder=False, or another method")
    if isinstance(text, AtomConfig) and not adapts_nothing(adapter) and isinstance(adapter, AtomConfig):
        if text.shaping() != adapter.shaping():
            raise UserError(
                f"{what}: its atoms differ from the UNet's, but a concept file has one AtomConfig: choose the same "
                "num_atoms, basis and channel blocks for both; channel_block_pattern makes exceptions by name"
            )
        file_budget([adapter, text])
    elif adapter is not None and not adapts_nothing(adapter):  # of two methods, or two of PEFT
        for config in (adapter, text):
            if isinstance(config, AtomConfig) and config.budget is not None:
                raise UserError(
                    f"{what}: with another method than atoms beside them there is no concept file, whose size "
                    f"select_budget={config.select_budget!r} is: leave it out, or use atoms for both"
                )
    return text


def make_trainable(model: Any, adapter: PeftConfig | None, seed: int) -> None:
    """Add the adapter to a model, so that its parameters alone are trained, or with None train all; in float32.

    The seed is that of the random numbers that some methods start from.

    Raises:
        UserError: The adapter does not fit the model.
    """
    model.requires_grad_(adapter is None)
    if adapter is not None:
        with fork_rng():  # some methods start from random numbers
            torch.manual_seed(derive_seed(seed, "adapter"))
            try:
                inject(model, copy.deepcopy(adapter), ADAPTER_NAME)
            except (ValueError, TypeError, LookupError, AttributeError) as error:  # as PEFT answers strange settings
                reason = error if isinstance(error, (ValueError, TypeError)) else repr(error)
                raise UserError(f"the adapter does not fit the base: {reason}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
