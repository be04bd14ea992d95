"""Checkpoints of a training run: written whole or not at all, and refused by a run that they do not belong to."""

import json
import math
import re
import time
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from atomdiff.utils.atomic import WriteError, new_folder, remove_folder
from atomdiff.utils.errors import UserError

# A run may go on with other learning rates, and for longer or shorter.
_MAY_CHANGE = (
    "max_train_steps learning_rate text_encoder_lr token_learning_rate scale_lr lr_scheduler lr_warmup_steps "
    "lr_num_cycles lr_power"
).split()

# Their product may not change, the batches of a step: each batch follows from its number among those of all processes.
_BATCHES = ("gradient_accumulation_steps", "num_processes")

_FOLDER = re.compile(r"checkpoint-\d+")  # others, such as copies that somebody made, are left alone
_RUN_FILE, _STATE_FILE = "run.json", "state.pt"
_FORMAT = 2  # raised whenever the names in the files change


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-N`: `state.pt` for the tensors, `run.json` for what the run was."""

    folder: Path

    @cached_property
    def run(self) -> dict[str, Any]:
        """`format`, `step`, `saved` (seconds since 1970) and `config`, a snapshot of the run's config.

        Raises:
            UserError: The file is missing or damaged, or of another version of atomdiff.
        """
        try:
            run = json.loads((self.folder / _RUN_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(_RUN_FILE, error) from error
        if isinstance(run, dict) and run.get("format") != _FORMAT:
            raise self._damaged(_RUN_FILE, "written by another version of atomdiff: start without a checkpoint")
        types: dict[str, Any] = {"step": int, "saved": (int, float), "config": dict}
        if not isinstance(run, dict) or not all(isinstance(run.get(name), type_) for name, type_ in types.items()):
            raise self._damaged(_RUN_FILE, f"no {', '.join(types)} in it")
        return run

    @cached_property
    def state(self) -> dict[str, Any]:
        """The tensors, on the CPU, read without running any code that may be among them.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with zipfile.ZipFile(self.folder / _STATE_FILE) as archive:  # whose checksums PyTorch does not look at
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(self.folder / _STATE_FILE, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise self._damaged(_STATE_FILE, error) from error
        if not isinstance(state, dict) or not isinstance(state.get("parameters"), dict) or "step" not in state:
            raise self._damaged(_STATE_FILE, "no step and parameters in it")
        return state

    def _damaged(self, name: str, error: object) -> UserError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return UserError(f"{self.folder}: not a readable checkpoint ({name}: {reason})")

    def check_files(self) -> None:
        """Check that the files are there and not cut off; `state` reads all of them.

        Raises:
            UserError: They are not.
        """
        if self.run and not zipfile.is_zipfile(self.folder / _STATE_FILE):
            raise self._damaged(_STATE_FILE, "missing or cut off")

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        """Read the state and check that it belongs to a run with this config snapshot.

        Raises:
            UserError: The checkpoint cannot be read, or was written with another config; learning rates, their schedule
                and the number of steps may differ. So may the number of processes if each accumulates as many more or
                fewer batches.
        """
        then, now, state = self.run["config"], config, self.state
        fixed = (now.keys() | then.keys()) - {*_MAY_CHANGE, *_BATCHES}
        if changed := sorted(key for key in fixed if then.get(key) != now.get(key)):
            changes = "; ".join(f"{key}={then.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise UserError(f"{self.folder}: written with {changes}. Use its values, or start without a checkpoint")
        _check_batches(self.folder, then, now)
        return state


def _check_batches(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a step has as many batches as it had."""
    old, new = ([config[name] for name in _BATCHES] for config in (then, now))
    batches, processes = math.prod(old), new[1]
    if batches == math.prod(new):
        return
    advice = "use its values"
    if batches % processes == 0:
        advice = f"use gradient_accumulation_steps={batches // processes}"
    written, current = (f"gradient_accumulation_steps={parts} on {count} process(es)" for parts, count in (old, new))
    expected = f"expected as many batches per step as before ({batches})"
    changed = f"written with {written}, now {current}"
    raise UserError(f"{folder}: {changed}; {expected}: {advice}, or start without a checkpoint")


def save_checkpoint(
    output_dir: Path, step: int, state: dict[str, Any], config: dict[str, Any], limit: int | None
) -> None:
    """Write `checkpoint-<step>`, then remove the oldest checkpoints beyond `limit`; damaged ones do not count.

    Raises:
        WriteError: It cannot be written; all others are still there.
    """
    folder = output_dir / f"checkpoint-{step}"
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (entries and entries.isdisjoint((_RUN_FILE, _STATE_FILE))):
        raise WriteError(folder, "something else of this name is there", "move it away, or name another output_dir")
    with new_folder(folder) as unfinished:
        with open(unfinished / _STATE_FILE, "wb") as file:
            torch.save(state, file)
        # also where the clock has been set back, it is newer than the others
        saved = max([time.time(), *(float(old.run["saved"]) + 1e-3 for old in _list_checkpoints(output_dir)[0])])
        run = {"format": _FORMAT, "step": step, "saved": saved, "config": config}
        (unfinished / _RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
    for old in find_checkpoints(output_dir)[:-limit] if limit is not None else ():
        remove_folder(old.folder)


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """List the checkpoints in a run's folder in the order in which they were written; warn of those that are damaged.

    Their tensors are not read.
    """
    checkpoints, problems = _list_checkpoints(output_dir)
    if problems:
        warnings.warn(f"skipped {'; '.join(problems)}", stacklevel=2)
    return checkpoints


def _list_checkpoints(output_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints in a folder in the order in which they were written, and what is wrong with others."""
    checkpoints, problems = [], []
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            checkpoint = Checkpoint(folder)
            try:
                checkpoint.check_files()
                checkpoints.append(checkpoint)
            except UserError as error:
                problems.append(str(error))
    return sorted(checkpoints, key=lambda checkpoint: float(checkpoint.run["saved"])), problems


def choose_checkpoint(resume_from: str | None, output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that `resume_from_checkpoint` means, or None to start anew.

    Args:
        resume_from: None, "latest" (the one written last that is whole, if there is any), or a checkpoint's folder or
            its name.
        output_dir: The run's folder.

    Raises:
        UserError: There is no such checkpoint, or for "latest" only damaged ones.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        return _latest(output_dir)
    for folder in (Path(resume_from), output_dir / resume_from):
        if (folder / _RUN_FILE).is_file() or (folder / _STATE_FILE).is_file():
            return Checkpoint(folder)
    names = ", ".join(checkpoint.folder.name for checkpoint in find_checkpoints(output_dir)) or "none"
    raise UserError(f"resume_from_checkpoint={resume_from!r}: no such checkpoint; {output_dir} holds {names}")


def _latest(output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that was written last of those that are whole; warn of those that are not."""
    checkpoints, problems = _list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        try:
            _ = checkpoint.state
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"skipped {'; '.join(problems)}; resuming from {checkpoint.folder}", stacklevel=3)
        return checkpoint
    if problems:
        raise UserError(f"{'; '.join(problems)}; there is no other: start without resume_from_checkpoint")
    return None
