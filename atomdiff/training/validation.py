"""Validation: images of the config's prompts every few steps, as a row of the contact sheet."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from atomdiff.training.base_model import all_parts_loaded, generate_images, training_resolution
from atomdiff.training.config import TrainConfig
from atomdiff.training.contact_sheet import drop_rows, extend_contact_sheet, row_files
from atomdiff.training.ema import averaged, evaluating
from atomdiff.training.run import Run
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.progress import log
from atomdiff.utils.seeds import derive_seed


def is_validation_step(config: TrainConfig, step: int, start: int) -> bool:
    """Tell whether the contact sheet is to get a row after this step, in a run that goes on from step `start`.

    It may have been stopped after the checkpoint of that step, before the row, or after both.
    """
    last = step == config.max_train_steps
    if not config.validation_steps or not (last or step % config.validation_steps == 0):
        return False
    if step != start or start == 0:
        return True
    return len(row_files(Path(config.output_dir), step)) < len(config.filled_validation_prompts)


def validate(run: Run, step: int) -> None:
    """Generate the validation images, each from a seed of its own, as a row of the contact sheet.

    A row that cannot be generated or written is only warned of: the training that would be lost is worth more.
    """
    if not run.accelerator.is_main_process:
        return
    output_dir, prompts = Path(run.config.output_dir), run.config.filled_validation_prompts
    log(f"step {step}: generating {len(prompts)} validation images")
    try:
        images = _generate(run, prompts)
    except (UserError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"step {step}: no row of the contact sheet: {reason}", stacklevel=1)
        drop_rows(output_dir, step)  # or those of an earlier run would pass for it
        return
    try:
        extend_contact_sheet(output_dir, step, images, prompts)
    except (OSError, WriteError) as error:
        warnings.warn(f"step {step}: the contact sheet cannot be written ({error})", stacklevel=1)


def _generate(run: Run, prompts: Sequence[str]) -> list[Image.Image]:
    """Generate an image for each prompt with the parameters that would be saved."""
    seeds = [derive_seed(0, "validation", index) for index in range(len(prompts))]
    models = [part for part in run.pipe.components.values() if isinstance(part, nn.Module)]
    with evaluating(models), averaged(run.trainable.values(), run.optimizer, run.ema):
        with all_parts_loaded(run.config, run.pipe), run.accelerator.autocast():
            side = training_resolution(run.config, run.pipe)
            return generate_images(run.config, run.pipe, side, prompts, seeds)
