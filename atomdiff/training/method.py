"""The one place that asks which method is trained: it reads the adapter's config, adds and saves the adapter."""

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import PeftConfig

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.pipelines.load import save_atoms
from atomdiff.pipelines.portable import save_portable
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed

ADAPTER_NAME = "default"

# Parts of Stable Diffusion pipelines, in a folder that one was saved to.
_PIPELINE_ENTRIES = (
    "model_index.json vae unet text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler safety_checker "
    "feature_extractor image_encoder"
).split()


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


def place_for(adapter: PeftConfig | None, path: Path) -> Path:
    """Return where `save_trained` writes to: `path`, with the suffix of a concept file if it will be one."""
    return path.with_name(f"{path.name}{CONCEPT_SUFFIX}") if isinstance(adapter, AtomConfig) else path


def check_place(place: Path, adapter: PeftConfig | None, read: Iterable[str | None]) -> None:
    """Refuse a place for `save_trained` that holds what the run reads, or that is no such result.

    Args:
        place: From `place_for`.
        adapter: The method.
        read: Files and folders that the run reads.

    Raises:
        UserError: It is such a place.
    """
    target = place.resolve()
    for path in filter(None, read):
        source = Path(path).resolve()
        if source.exists() and (source.is_relative_to(target) or target.is_relative_to(source)):
            advice = "name another output_dir, or rename the folder of the photos, whose name it has"
            raise UserError(f"{place}: the result would replace {path!r}, which the run reads; {advice}")
    if adapter is None and place.is_dir() and any(place.iterdir()) and not (place / "model_index.json").is_file():
        raise UserError(f"{place}: holds something else than a pipeline; move it away, or name another output_dir")


def save_trained(pipe: StableDiffusionPipeline, adapter: PeftConfig | None, path: Path, **facts: Any) -> None:
    """Save a trained pipeline's adapter, or all of the pipeline if the method is full tuning.

    Args:
        pipe: The pipeline, complete, with the trigger word's vector set.
        adapter: The method.
        path: From `place_for`.
        **facts: For `atomdiff.save_atoms`: trigger_phrase, training, base_model.
    """
    if adapter is None:
        write_pipeline(pipe, path)
    else:
        save_atoms(pipe, path, adapter_name=ADAPTER_NAME, **facts)


def write_pipeline(pipe: Any, folder: Path) -> None:
    """Save a pipeline whole or not at all; of what the folder holds, only the parts of another pipeline are replaced.

    Raises:
        WriteError: It cannot be written.
    """
    with new_folder(folder, own=(*_PIPELINE_ENTRIES, *pipe.components)) as unfinished:
        save_portable(pipe, unfinished)
