"""What a run gives before its end: concepts of some steps, and what is asked for while it runs."""

import re
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.training.config import TrainConfig
from atomdiff.training.ema import averaged
from atomdiff.training.run import Run
from atomdiff.training.saving import complete_pipeline, concept_metadata, result_path, save_trained
from atomdiff.utils.atomic import remove_folder
from atomdiff.utils.errors import UserError

GENERATE_FILE = "generate_now"
"""A file of this name in a run's folder asks for validation images after the next step."""
SAVE_FILE = "save_now"
"""A file of this name in a run's folder asks for a checkpoint and a concept after the next step."""
STEPS_FOLDER = "steps"
"""Where the concepts of steps are, in a run's folder."""

_SAVED = re.compile(rf".+-step-(\d+)(?:{re.escape(CONCEPT_SUFFIX)})?")


def take_requests(run: Run) -> set[str]:
    """Return `GENERATE_FILE` and `SAVE_FILE`, if they have been put into the run's folder; they are removed.

    On other processes than the main one, none are.
    """
    if not run.accelerator.is_main_process:
        return set()
    folder = Path(run.config.output_dir)
    asked = {name for name in (GENERATE_FILE, SAVE_FILE) if (folder / name).is_file()}
    for name in asked:
        (folder / name).unlink(missing_ok=True)
    if asked and run.accelerator.is_fsdp2:
        why = "a process has only a part of each weight while it trains"
        warnings.warn(f"{', '.join(sorted(asked))}: passed over with FSDP: {why}", stacklevel=1)
        return set()
    return asked


def is_save_step(config: TrainConfig, step: int) -> bool:
    """Tell whether a concept is saved after this step, beside that of the run's end."""
    return config.save_steps > 0 and step % config.save_steps == 0 and step < config.max_train_steps


def save_step(run: Run, adapter: PeftConfig | None, step: int, average_loss: float) -> None:
    """Save what is trained as it is after a step, on the main process; what cannot be saved is only warned of."""
    if not run.accelerator.is_main_process:
        return
    folder = Path(run.config.output_dir) / STEPS_FOLDER
    metadata: dict[str, Any] = concept_metadata(run, step, average_loss, run.config.snapshot())
    try:
        with averaged(run.trainable.values(), run.optimizer, run.ema), complete_pipeline(run):
            path = result_path(adapter, folder / f"{run.config.name}-step-{step:06d}")
            save_trained(run.pipe, adapter, path, **metadata)
    except (UserError, OSError) as error:
        warnings.warn(f"step {step}: its concept is not saved: {error}", stacklevel=1)


def list_saved_steps(output_dir: Path) -> list[tuple[int, Path]]:
    """List the concepts of steps that a run has saved, in order."""
    found = [(_SAVED.fullmatch(path.name), path) for path in (output_dir / STEPS_FOLDER).glob("*-step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def drop_saved_steps(run: Run, done: int) -> None:
    """Remove the concepts of steps after `done`, which an earlier run has left."""
    if run.accelerator.is_main_process:
        for step, path in list_saved_steps(Path(run.config.output_dir)):
            if step > done:
                remove_folder(path) if path.is_dir() else path.unlink()
