"""A training loop that ends when its seconds or steps are over, and can be resumed; its learning rate follows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from atomdiff.utils.atomic import new_file
from benchmarks.pretrain.fastest import captured
from benchmarks.pretrain.muon import make_optimizers

_REPORT_STEPS = 20


@dataclass
class Stage:
    """How long and how fast a network trains, and how it went.

    It ends after `seconds`, or after `total_steps` if there are any: on a shared machine seconds say little.
    """

    name: str
    seconds: float
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.02
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    steps: int = 0

    def progress(self, elapsed: float) -> float:
        """Share of the stage that is done after `elapsed` seconds."""
        return self.steps / self.total_steps if self.total_steps else elapsed / max(self.seconds, 1e-3)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their means over the processes of a run."""
    if PartialState().num_processes > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_copy_(gradients, reduce(gradients, "mean"))


class Stateful(Protocol):
    """What a checkpoint keeps: models, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]:
        """All of the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a stage keeps its state, and how often.

    Args:
        folder: receives `resume-<stage>.pt`.
        seconds: between two checkpoints; 0: none are kept.
    """

    folder: Path
    seconds: float = 0.0

    def load(self, stage: Stage, parts: Mapping[str, Stateful]) -> float:
        """Restore a stage that was stopped; gives the seconds that it had run, 0 for a new one."""
        path = self.folder / f"resume-{stage.name}.pt"
        if not self.seconds or not path.exists():
            return 0.0
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        stage.seconds, stage.steps, stage.losses = state["seconds"], state["steps"], state["losses"]
        torch.manual_seed(torch.initial_seed() + stage.steps)  # not the images and the noise of the first steps again
        print(f"{stage.name}: resumed at step {stage.steps} after {state['elapsed']:.0f} s", flush=True)
        return float(state["elapsed"])

    def save(self, stage: Stage, parts: Mapping[str, Stateful], elapsed: float) -> None:
        """Write the state of a stage that has run for `elapsed` seconds; of several processes the first one does."""
        if not PartialState().is_main_process:
            return
        clock = {"seconds": stage.seconds, "steps": stage.steps, "losses": stage.losses, "elapsed": elapsed}
        with new_file(self.folder / f"resume-{stage.name}.pt") as file:
            torch.save({name: part.state_dict() for name, part in parts.items()} | clock, file)


def rate_at(progress: float, warmup: float) -> float:
    """Share of the highest learning rate: a linear warm-up, then half a cosine down to 2 %."""
    if progress < warmup:
        return progress / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


@dataclass(frozen=True)
class Phase:
    """What is minimized during a part of a stage.

    Args:
        loss_of: the loss of a fresh batch.
        until: progress of the stage at which the next phase begins.
        captured: whether its steps are replayed as one CUDA graph (see `fastest.captured`).
    """

    loss_of: Callable[[], Tensor]
    until: float = 1.0
    captured: bool = False


class Average:
    """Moving averages of a model's parameters, one a decay; early steps count less (as in EMA with warm-up)."""

    def __init__(self, model: nn.Module, decays: tuple[float, ...]) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.decays = decays
        self.copies = [[p.detach().clone() for p in self.parameters] for _ in decays]
        self._now = [torch.zeros((), device=self.parameters[0].device) for _ in decays]

    def state_dict(self) -> dict[str, Any]:
        """The averages, by number."""
        return {str(index): copy for index, copy in enumerate(self.copies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take averages that were saved."""
        for index, copy in enumerate(self.copies):
            torch._foreach_copy_(copy, state[str(index)])

    def at(self, step: int) -> None:
        """Set how much the next update counts: that after `step` steps."""
        for now, decay in zip(self._now, self.decays, strict=True):
            now.fill_(min(decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in."""
        for now, copy in zip(self._now, self.copies, strict=True):
            torch._foreach_mul_(copy, now)
            torch._foreach_add_(copy, torch._foreach_mul(self.parameters, 1 - now))

    @torch.no_grad()
    def write_to_model(self, index: int) -> None:
        """Replace the model's parameters by the average of the decay at `index`."""
        for parameter, copy in zip(self.parameters, self.copies[index], strict=True):
            parameter.copy_(copy)


class Steps:
    """Training steps with Muon and AdamW.

    All that a step reads besides a batch are tensors, which `prepare` fills: it can be replayed as a CUDA graph.
    """

    def __init__(self, stage: Stage, model: nn.Module, average: Average | None) -> None:
        self.stage, self.model, self.average = stage, model, average
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = make_optimizers(model, stage.learning_rate, stage.weight_decay)
        self.total = torch.zeros((), device=self.parameters[0].device)

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint keeps."""
        parts: dict[str, Stateful] = {
            "model": self.model,
            **({} if self.average is None else {"average": self.average}),
        }
        return parts | {f"optimizer_{index}": optimizer for index, optimizer in enumerate(self.optimizers)}

    def prepare(self, progress: float) -> None:
        """Set the learning rates, and how much the averages take in, for the next step."""
        rate = self.stage.learning_rate * max(rate_at(progress, self.stage.warmup), 1e-3)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["lr"].to(self.total.device)  # after a checkpoint
            group["lr"].fill_(rate)
        if self.average is not None:
            self.average.at(self.stage.steps + 1)

    def take(self, loss_of: Callable[[], Tensor]) -> None:
        """Move the parameters once, and add the loss to `total`."""
        self.clear_gradients()
        loss = loss_of()
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update()
        self.total.add_(loss.detach())

    def note_losses(self, progress: float) -> None:
        """Note the mean loss of the last steps in the stage.

        Raises:
            FloatingPointError: it is not finite.
        """
        stage = self.stage
        stage.losses.append(round(self.total.item() / _REPORT_STEPS, 5))
        self.total.zero_()
        if not math.isfinite(stage.losses[-1]):
            raise FloatingPointError(f"{stage.name}: the loss is {stage.losses[-1]} after {stage.steps} steps")
        if len(stage.losses) % 10 == 1:
            print(f"{stage.name}: {progress:.2f} step {stage.steps} loss {stage.losses[-1]:.4f}", flush=True)

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def run_stage(
    stage: Stage,
    model: nn.Module,
    phases: Sequence[Phase],
    average: Average | None = None,
    after_step: Callable[[], None] = lambda: None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `model` with Muon and AdamW until the stage is over.

    Args:
        stage: receives the losses, every 20 steps their mean, and the number of steps.
        model: what is trained: its parameters that require a gradient.
        phases: what is minimized, one after another.
        average: takes the parameters in after every step.
        after_step: called after every step.
        checkpoints: where the stage goes on if it was stopped, and keeps its state.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    steps = Steps(stage, model, average)
    checkpoints = checkpoints or Checkpoints(Path())
    model.train()
    elapsed = kept = checkpoints.load(stage, steps.parts)
    begin, progress = time.perf_counter() - elapsed, stage.progress(elapsed)
    current = -1
    while progress < 1.0 or stage.steps < 2:
        steps.prepare(progress)
        wanted = next((i for i, phase in enumerate(phases) if progress < phase.until), len(phases) - 1)
        if wanted != current:
            current, step = wanted, partial(steps.take, phases[wanted].loss_of)
            run = captured(step) if phases[wanted].captured else step
            steps.total.zero_()  # of the steps before the capture
        run()
        stage.steps += 1
        after_step()
        if stage.steps % _REPORT_STEPS == 0:
            steps.note_losses(progress)
        elapsed = time.perf_counter() - begin
        progress = stage.progress(elapsed)
        if checkpoints.seconds and (elapsed - kept > checkpoints.seconds or progress >= 1):
            checkpoints.save(stage, steps.parts, elapsed)
            kept = elapsed
    steps.clear_gradients()
    model.eval()
    print(f"{stage.name}: {stage.steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
