"""The method of a run: the adapters of its models are read and added here, and saved in `saving.py`."""

import copy
import dataclasses
from typing import Any

import torch
from peft import PeftConfig

from atomdiff.tuner import AtomConfig
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed

ADAPTER_NAME = "default"


def read_text_adapter(text_adapter: str | None, adapter: PeftConfig | None) -> PeftConfig | None:
    """Read what is to be trained of the text encoders: the config of a PEFT method, or None for all of them.

    Args:
        text_adapter: As `read_adapter` takes it. None: all if the whole UNet is trained, else atoms on the attention,
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
    found = read_adapter(text_adapter)
    what = f"text_encoder_adapter={text_adapter!r}"
    if (found is None) != (adapter is None):
        raise UserError(f"{what}: either all of the UNet and of the text encoders is trained, or adapters for both")
    if isinstance(found, AtomConfig) and isinstance(adapter, AtomConfig) and found.shaping() != adapter.shaping():
        raise UserError(
            f"{what}: found other atoms than the UNet's, but a file holds one AtomConfig: choose the same num_atoms, "
            "basis and channel blocks for both; channel_block_pattern makes exceptions by name"
        )
    return found


def make_trainable(model: Any, adapter: PeftConfig | None, seed: int) -> None:
    """Add the adapter, so that its parameters alone are trained, or without one train all; in float32.

    Args:
        model: A UNet or a text encoder.
        adapter: The method.
        seed: Of the numbers that some methods start from.

    Raises:
        UserError: The adapter does not fit the model.
    """
    model.requires_grad_(adapter is None)
    if adapter is not None:
        with torch.random.fork_rng():  # some methods start from random numbers
            torch.manual_seed(derive_seed(seed, "adapter"))
            try:
                added = copy.deepcopy(adapter)
                model.add_adapter(added, ADAPTER_NAME)
                added.base_model_name_or_path = adapter.base_model_name_or_path  # transformers sets the base's folder
            except (ValueError, TypeError, LookupError, AttributeError) as error:  # so PEFT answers strange settings
                said = error if isinstance(error, (ValueError, TypeError)) else repr(error)
                raise UserError(f"the adapter does not fit the base: {said}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
