"""Training of several subjects in one batch: as many runs, whose steps share the passes through the base.

Each run has its own images, adapter, token embeddings, optimizer, clipping and schedule, and the same random numbers as
alone, so that it gives the concept that it gives alone, but for rounding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from atomdiff.training.base_model import BasePipeline, load_base
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import finish_run, is_checkpoint_step, start_run
from atomdiff.training.evaluation import evaluate_result
from atomdiff.training.intermediate import (
    GENERATE_FILE,
    SAVE_FILE,
    drop_saved_steps,
    is_save_step,
    save_step,
    take_requests,
)
from atomdiff.training.joint_denoiser import JointDenoiser, share_weights
from atomdiff.training.joint_step import Member, train_step
from atomdiff.training.launch import start_accelerator
from atomdiff.training.measurements import measure, start_measuring
from atomdiff.training.preflight import check_runs
from atomdiff.training.report.write import reporting_divergence
from atomdiff.training.resume import finished_before, save_state
from atomdiff.training.signals import StopSignals
from atomdiff.training.steps_log import StepsLog
from atomdiff.training.together_checks import check_started, check_together
from atomdiff.training.validation import is_validation_step, validate
from atomdiff.utils.atomic import remove_leftovers
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import ProgressBar, log


def train_subjects(config: TrainConfig) -> dict[str, Path | UserError]:
    """Train the subjects of a `concepts_list`, `subjects_per_batch` of them at a time.

    Each has a folder of its own, with all that a run alone leaves there. With `resume_from_checkpoint` "latest",
    subjects that are finished are left alone, and the others go on from their checkpoints.

    Returns:
        The concept's file of each subject, by the subject's name; or why there is none.

    Raises:
        UserError: Something cannot be trained in one batch, or a folder cannot be read or written; nothing was trained.
        KeyboardInterrupt: Ctrl-C or SIGTERM; checkpoints were saved.
    """
    runs = config.runs()
    check_runs(runs)
    check_together(runs)
    results: dict[str, Path | UserError] = {}
    waiting = []
    for run in runs:
        finished = finished_before(run) if config.resume_from_checkpoint == "latest" else None
        if finished is None:
            waiting.append(run)
        else:
            log(f"{run.name}: finished already")
            results[run.name] = finished
    if waiting:
        log(f"loading the base {config.pretrained_model_name_or_path}")
        base = load_base(config)
        for first in range(0, len(waiting), config.subjects_per_batch):
            results |= train_together(waiting[first : first + config.subjects_per_batch], base)
            gc.collect()  # of the runs, whose parts know each other
    return {run.name: results[run.name] for run in runs}


def train_together(configs: Sequence[TrainConfig], base: BasePipeline) -> dict[str, Path | UserError]:
    """Train some runs in one batch, on copies of a base that share its weights.

    Args:
        configs: Runs that `check_runs` and `check_together` allow.
        base: As `load_base` gives it; it stays as it is.

    Returns:
        The concept's file of each run, by its name; or why there is none.

    Raises:
        UserError: The machine or the base does not allow it.
        KeyboardInterrupt: Ctrl-C or SIGTERM; checkpoints were saved.
    """
    results: dict[str, Path | UserError] = {}
    members: list[Member] = []
    with ExitStack() as stack:
        for config in configs:
            log(f"subject {config.name}")
            with _noting_errors(results, config.name):
                accelerator = start_accelerator(config)
                stack.enter_context(lock_folder(Path(config.output_dir)))
                for folder in (config.cache_folder, Path(config.output_dir) / "validation"):
                    remove_leftovers(folder)
                started = start_run(config, accelerator, base=base)
                steps_log = StepsLog(started.run, started.done, started.average_loss, show=False)
                members.append(Member(len(members), started, stack.enter_context(closing(steps_log))))
                if len(members) > 1:  # at once: a GPU may have no room for a base of each
                    share_weights(members[0].run.model, started.run.model)
        if members:
            check_started(members[0].run)
            training_loop(members, JointDenoiser([member.run.model for member in members]))
        for member in members:
            with _noting_errors(results, member.run.config.name):
                if member.error is not None:
                    with reporting_divergence(member.run):
                        raise member.error
                results[member.run.config.name] = _finish(member)
    return results


def _finish(member: Member) -> Path:
    """Save a run's result, and evaluate it if that is asked for."""
    config, accelerator = member.run.config, member.run.accelerator
    path = finish_run(member.started, member.log.average_loss)
    if config.evaluate_with:
        evaluate_result(config, path, accelerator)
    return path


@contextmanager
def _noting_errors(results: dict[str, Path | UserError], name: str) -> Iterator[None]:
    """Make a `with` block whose user errors are a run's result, so that the others go on."""
    try:
        yield
    except UserError as error:
        log(f"{name}: {error}")
        results[name] = error


def training_loop(members: Sequence[Member], denoiser: JointDenoiser) -> None:
    """Train all runs to their last step; those whose numbers are not finite any more are stopped, see `Member.error`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, after checkpoints were saved.
    """
    steps = members[0].run.config.max_train_steps
    for member in members:
        run, done = member.run, member.started.done
        start_measuring(run, done)
        drop_saved_steps(run, done)
        if done < steps and is_validation_step(run.config, done, done):
            validate(run, done)
    first = min(member.started.done for member in members)
    with (
        ProgressBar(total=steps, initial=first, desc=f"training {len(members)} subjects") as bar,
        StopSignals() as stop,
    ):
        for step in range(first + 1, steps + 1):
            active = [member for member in members if member.trains_in(step)]
            started = time.perf_counter()
            losses = train_step(active, denoiser, step) if active else {}
            for member in active:
                if member.error is None:
                    member.log.note(step, losses[member.number], (time.perf_counter() - started) / len(active))
                    measure(member.run, step)
            stopping = stop.requested and step < steps
            asked = {member.number: take_requests(member.run) for member in active}
            _save_states(active, step, stopping, asked)
            bar.update()
            for member in active if step < steps else ():
                is_due = is_validation_step(member.run.config, step, member.started.done)
                if member.error is None and (is_due or GENERATE_FILE in asked[member.number]):
                    validate(member.run, step)


def _save_states(members: Sequence[Member], step: int, stopping: bool, asked: Mapping[int, set[str]]) -> None:
    """Save the checkpoints and concepts of a step, of the members for which it is time or that were asked for it.

    Raises:
        KeyboardInterrupt: The training stops, with checkpoints of all that could be written.
    """
    unsaved = []
    for member in members:
        run, save = member.run, SAVE_FILE in asked[member.number]
        if member.error is not None:
            continue
        if save or is_save_step(run.config, step):
            save_step(run, member.started.adapter, step, member.log.average_loss)
        if stopping or save or is_checkpoint_step(run.config, step):
            try:
                save_state(run, step, member.log.average_loss, member.started.snapshot, stopping)
            except KeyboardInterrupt as error:
                unsaved.append(f"{run.config.name}: {error}")
    if stopping:
        how = "resume with the same command and --resume_from_checkpoint latest"
        raise KeyboardInterrupt("; ".join([f"stopped; the checkpoints of step {step} are saved: {how}", *unsaved]))


def describe_results(results: Mapping[str, Path | UserError]) -> str:
    """Return a line about each subject's result.

    Raises:
        UserError: A subject has none; the message has the lines of all.
    """
    lines = [f"saved {found}" for found in results.values() if isinstance(found, Path)]
    failed = [f"{name} is not saved: {found}" for name, found in results.items() if isinstance(found, UserError)]
    if failed:
        raise UserError("\n".join([f"{len(failed)} of {len(results)} subjects failed", *failed, *lines]))
    return "\n".join(lines)
