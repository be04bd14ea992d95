"""Going on where a run stopped: what a checkpoint holds of it, and whether it belongs to it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig

from atomdiff.training.checkpoint import choose_checkpoint, save_checkpoint
from atomdiff.training.config import TrainConfig
from atomdiff.training.fingerprint import differences
from atomdiff.training.launch import start_accelerator
from atomdiff.training.measurements import LOG_FILE, BestParameters, first_best_step
from atomdiff.training.method import read_text_adapter
from atomdiff.training.optimizers import load_optimizer
from atomdiff.training.run import Run
from atomdiff.training.run_log import read_log
from atomdiff.training.run_record import finished_result
from atomdiff.training.sharding import split_like, whole
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError

_OR_START = "or start without resume_from_checkpoint in another output_dir"


def config_snapshot(
    config: TrainConfig, accelerator: Accelerator, adapter: PeftConfig | None, text_adapter: PeftConfig | None
) -> dict[str, Any]:
    """Return what a checkpoint must have been written with, so that the run may go on from it."""
    snapshot = {
        **config.snapshot(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "adapter": describe_adapter(adapter),
    }
    if config.train_text_encoder:
        snapshot["text_encoder_adapter"] = describe_adapter(text_adapter)
    return snapshot


def read_state(config: TrainConfig, snapshot: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state in the checkpoint that the run goes on from, or None if it starts anew.

    Raises:
        UserError: The checkpoint is missing or of another run, or beyond the run's last step.
    """
    checkpoint = choose_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    if checkpoint is None:
        return None
    state = checkpoint.load(snapshot)
    if state["step"] > config.max_train_steps:
        found = f"max_train_steps={config.max_train_steps}, but {checkpoint.folder} is at step {state['step']}"
        raise UserError(f"{found}; train at least as many steps, or resume from an earlier checkpoint")
    return {**state, "checkpoint": str(checkpoint.folder)}


def save_state(run: Run, step: int, average_loss: float, snapshot: dict[str, Any], stopping: bool) -> None:
    """Save a checkpoint on the main process. One that cannot be written is only warned of, unless the run stops there.

    To be called on all processes. With DeepSpeed nothing is saved.

    Raises:
        KeyboardInterrupt: The run stops, and its checkpoint cannot be written.
    """
    config = run.config
    accelerator = run.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    if not accelerator.is_main_process and not accelerator.is_fsdp2:
        return
    state = {"step": step, "average_loss": average_loss, **state_of(run)}
    if not accelerator.is_main_process:
        return
    state |= {"config": config.snapshot(), "fingerprint": run.dataset.fingerprint, "start": run.start}
    best = run.measurements.best
    state["best"] = None if best is None else vars(best)
    try:
        save_checkpoint(Path(config.output_dir), step, state, snapshot, config.checkpoints_total_limit)
    except WriteError as error:
        if stopping:
            raise KeyboardInterrupt(f"stopped at step {step}, which is not saved: {error}") from error
        warnings.warn(f"step {step}: {error}. Training continues without this checkpoint", stacklevel=1)


def how_to_go_on(run: Run, step: int) -> str:
    """Say what is left of a run that was stopped after a step."""
    if run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "stopped; with DeepSpeed nothing is saved: start again"
    saved = Path(run.config.output_dir) / f"checkpoint-{step}"
    return f"stopped; {saved} is saved: resume with the same command and --resume_from_checkpoint latest"


@contextmanager
def checkpoint_on_error(run: Run, average_loss: float, snapshot: dict[str, Any]) -> Iterator[None]:
    """Make a `with` block that saves what was trained; if it cannot, as without the base, a checkpoint of it is saved.

    Unless it could only not be written: `write_result` looks for another place then.

    Raises:
        UserError: As the block; the message says how to go on.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if run.accelerator.is_fsdp2:  # the other processes are waiting
            raise
        step = run.config.max_train_steps
        folder = Path(run.config.output_dir) / f"checkpoint-{step}"
        save_state(run, step, average_loss, snapshot, stopping=False)
        if not isinstance(error, UserError) or not folder.is_dir():
            raise
        advice = f"what was trained is in {folder}: then resume with --resume_from_checkpoint latest"
        raise UserError(f"{error}; {advice}") from error


def state_of(run: Run) -> dict[str, Any]:
    """Return the tensors that a later process needs to go on; all randomness follows from seed and step.

    To be called on all processes if weights are split among them.
    """
    scaler = run.accelerator.scaler
    return {
        "parameters": {name: whole(parameter.detach()).cpu() for name, parameter in run.trainable.items()},
        "optimizer": whole(run.optimizer.state_dict()),
        "ema": run.ema.state_dict() if run.ema else None,
        "scaler": scaler.state_dict() if scaler else None,
    }


def load_state(run: Run, state: dict[str, Any]) -> None:
    """Put back what `save_state` saved; learning rates stay those of the config.

    Raises:
        UserError: It is of a run that learned from something else, or has other parameters.
    """
    if changes := differences(state["fingerprint"], run.dataset.fingerprint):
        written = f"{state['checkpoint']}: written with {'; '.join(changes)}"
        raise UserError(f"{written}. Restore what it was trained on, {_OR_START}")
    shapes = {name: parameter.shape for name, parameter in run.trainable.items()}
    if {name: tensor.shape for name, tensor in state["parameters"].items()} != shapes:
        written = f"{state['checkpoint']}: written by another version, with other parameters"
        raise UserError(f"{written}. Use that version, {_OR_START}")
    if run.config.keep_best and not state.get("best"):
        _check_nothing_measured(run, state)
    put_back(run, state)
    run.start.extend(state.get("start", []))
    if (best := state.get("best")) and run.config.keep_best:
        run.measurements.best = BestParameters(**best)


def _check_nothing_measured(run: Run, state: dict[str, Any]) -> None:
    """Check that no parameters have been lost that `keep_best` would have kept.

    Raises:
        UserError: A validation loss was measured on the way to the checkpoint, without them.
    """
    log = read_log(Path(run.config.output_dir) / LOG_FILE)
    first = first_best_step(run, max(run.config.max_train_steps, state["config"]["max_train_steps"]))
    measured = [line["step"] for line in log if "validation_loss" in line and first <= line["step"] <= state["step"]]
    if measured:
        written = f"{state['checkpoint']}: written without keep_best, so it lacks the parameters of step {measured[0]}"
        raise UserError(f"{written} and later measurements. Leave keep_best out, {_OR_START}")


def finished_before(config: TrainConfig) -> Path | None:
    """Return the result of a run that was finished with the same settings before; None if it was not."""
    adapter = read_adapter(config.adapter)
    text_adapter = read_text_adapter(config.text_encoder_adapter, adapter) if config.train_text_encoder else None
    snapshot = config_snapshot(config, start_accelerator(config), adapter, text_adapter)
    return finished_result(Path(config.output_dir), snapshot, keep_best=config.keep_best)


def put_back(run: Run, state: dict[str, Any]) -> None:
    """Give a run what `state_of` gave."""
    for name, parameter in run.trainable.items():
        parameter.data.copy_(split_like(parameter, state["parameters"][name]))
    load_optimizer(run.optimizer, state["optimizer"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])
        run.ema.to(run.accelerator.device)
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
