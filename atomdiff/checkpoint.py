"""Checkpoints of a training run: written whole or not at all, and refused by a run that they do not belong to."""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomdiff.errors import UserError

# A run may go on with other learning rates, and for longer or shorter.
_MAY_CHANGE = (
    "max_train_steps learning_rate text_encoder_lr token_learning_rate scale_lr lr_scheduler lr_warmup_steps "
    "lr_num_cycles lr_power"
).split()

# Their product may not change, the batches of a step: each batch follows from its number among those of all processes.
_BATCHES = ("gradient_accumulation_steps", "num_processes")


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-N`: `state.pt` for the tensors, `run.json` for what the run was."""

    folder: Path

    @property
    def run(self) -> dict[str, Any]:
        """`step`, `saved` (seconds since 1970) and `recipe`."""
        run: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return run

    def load(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Read the state on the CPU, without running any code that may be in it.

        Raises:
            UserError: The checkpoint cannot be read, or was written with another recipe; learning rates, their course
                and the number of steps may differ. So may the number of processes if each accumulates as many more or
                fewer batches; a checkpoint from before that number was noted counts as one of a single process.
        """
        try:
            run = self.run
            state: dict[str, Any] = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise UserError(f"{self.folder}: not a readable checkpoint ({error})") from error
        then, now = run["recipe"], recipe
        free = (*_MAY_CHANGE, *_BATCHES)
        changed = [key for key in now.keys() | then.keys() if then.get(key) != now.get(key) and key not in free]
        if changed:
            changes = "; ".join(f"{key}={then.get(key)!r}, now {now.get(key)!r}" for key in sorted(changed))
            raise UserError(f"{self.folder}: written with {changes}. Use its values, or start without a checkpoint")
        _check_batches(self.folder, then, now)
        return state


def _check_batches(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a step has as many batches as it had."""
    old, new = ([recipe.get(name) or 1 for name in _BATCHES] for recipe in (then, now))
    batches, processes = math.prod(old), new[1]
    if batches == math.prod(new):
        return
    found, other = (f"gradient_accumulation_steps={parts} on {count} process(es)" for parts, count in (old, new))
    how = "use its values"
    if batches % processes == 0:
        how = f"take gradient_accumulation_steps={batches // processes}"
    expected = f"expected as many batches a step as there were ({batches})"
    raise UserError(f"{folder}: written with {found}, now {other}; {expected}: {how}, or start without a checkpoint")


def save_checkpoint(
    output_dir: Path, step: int, state: dict[str, Any], recipe: dict[str, Any], limit: int | None
) -> None:
    """Write `checkpoint-<step>`, then remove the oldest checkpoints beyond `limit`."""
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f"unfinished-{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.save(state, unfinished / "state.pt")
    run = {"step": step, "saved": time.time(), "recipe": recipe}
    (unfinished / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    if limit is not None:
        for old in find_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old.folder)


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """List the checkpoints in a run's folder in the order in which they were written."""
    found = [Checkpoint(run.parent) for run in output_dir.glob("checkpoint-*/run.json")]
    return sorted(found, key=lambda checkpoint: float(checkpoint.run["saved"]))


def choose_checkpoint(resume_from: str | None, output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that `resume_from_checkpoint` means, or None to start anew.

    Args:
        resume_from: None, "latest" (the one written last, if there is any), or a checkpoint's folder or its name.
        output_dir: The run's folder.

    Raises:
        UserError: There is no such checkpoint.
    """
    if resume_from is None:
        return None
    found = find_checkpoints(output_dir)
    if resume_from == "latest":
        return found[-1] if found else None
    for folder in (Path(resume_from), output_dir / resume_from):
        if (folder / "run.json").is_file():
            return Checkpoint(folder)
    names = ", ".join(checkpoint.folder.name for checkpoint in found) or "none"
    raise UserError(f"resume_from_checkpoint={resume_from!r}: no such checkpoint; {output_dir} holds {names}")
