"""A step of several runs that share the passes through the base; each has its own gradients, clipping and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from atomdiff.training.anomalies import DivergedError, refuse_unless_finite
from atomdiff.training.batch_loss import TrainingBatch, loss_of, training_batch
from atomdiff.training.batches import batches_of
from atomdiff.training.dreambooth import StartedRun
from atomdiff.training.joint_denoiser import JointDenoiser
from atomdiff.training.layer_budget import keep_to_budget
from atomdiff.training.loop import clip_gradients, set_learning_rates
from atomdiff.training.run import Run
from atomdiff.training.steps_log import StepsLog


@dataclass
class Member:
    """A run among those that are trained together."""

    number: int
    """Its number in the joint denoiser."""
    started: StartedRun
    log: StepsLog
    error: DivergedError | None = None
    """Why it was stopped."""

    @property
    def run(self) -> Run:
        """The run."""
        return self.started.run

    def trains_in(self, step: int) -> bool:
        """Tell whether it has this step still to do."""
        return self.error is None and step > self.started.done

    @contextmanager
    def stopped_by_error(self) -> Iterator[None]:
        """Make a `with` block in which numbers that are not finite stop this run, and no other."""
        try:
            yield
        except DivergedError as error:
            self.error = error


def train_step(members: Sequence[Member], denoiser: JointDenoiser, step: int) -> dict[int, float]:
    """Train one step of each run; a run with a loss or gradient that is not finite does not move, and has its error.

    Returns:
        The mean loss of the step's batches, by the number of each of the other runs.
    """
    losses: dict[int, list[float]] = {member.number: [] for member in members}
    for member in members:
        run = member.run
        set_learning_rates(run.optimizer, run.lr_factor(step - 1))
        if step > run.config.token_steps:
            run.model.freeze_token_embeddings()
    for number in batches_of(members[0].run, step):
        batches = [(member, training_batch(member.run, number)) for member in members if member.error is None]
        for size in {batch.samples.latents.shape[1:] for _, batch in batches}:
            of_size = [(member, batch) for member, batch in batches if batch.samples.latents.shape[1:] == size]
            for (member, _), loss in zip(of_size, backward(of_size, denoiser, step, number), strict=True):
                losses[member.number].append(loss)
    for member in members:
        if member.error is None:
            with member.stopped_by_error():
                _move(member.run, step)
        if member.error is not None:
            member.run.optimizer.zero_grad()
    return {number: sum(each) / len(each) for number, each in losses.items()}


def backward(
    batches: Sequence[tuple[Member, TrainingBatch]], denoiser: JointDenoiser, step: int, number: int
) -> list[float]:
    """Add the gradients of the batches of this number, whose latents have one size; return the loss of each run.

    The gradients of a run come from its own samples alone.
    """
    accelerator = batches[0][0].run.accelerator
    preserved = [(member.number, batch.preserved) for member, batch in batches if batch.preserved is not None]
    with accelerator.autocast():
        base = denoiser.predict_base(preserved) if preserved else [None] * len(batches)
        predictions = denoiser.predict([(member.number, batch.samples) for member, batch in batches])
    losses: list[float] = []
    finite: list[Tensor] = []
    for (member, batch), prediction, of_base in zip(batches, predictions, base, strict=True):
        loss = loss_of(member.run, number, batch, prediction, of_base)
        losses.append(float(loss.detach()))
        with member.stopped_by_error():
            refuse_unless_finite(member.run, step, "loss", losses[-1], range(number, number + 1))
            finite.append(loss)
    if finite:
        accelerator.backward(torch.stack(finite).sum())
    return losses


def _move(run: Run, step: int) -> None:
    """Move the parameters of a run by their gradients, which are clipped as they are alone.

    Raises:
        DivergedError: The gradients are not finite; nothing has moved.
    """
    run.model.clear_frozen_gradients()
    norm = clip_gradients(run.accelerator, run.trainable.values(), run.config.max_grad_norm)
    refuse_unless_finite(run, step, "gradient's norm", norm, batches_of(run, step))
    run.optimizer.step()
    run.optimizer.zero_grad()
    keep_to_budget(run, step)
    if run.ema is not None:
        run.ema.step(run.trainable.values())
