"""A training loop that ends when its seconds or steps are over, and can be resumed; its learning rate follows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atomdiff.utils.atomic import new_file
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
        """Write the state of a stage that has run for `elapsed` seconds."""
        clock = {"seconds": stage.seconds, "steps": stage.steps, "losses": stage.losses, "elapsed": elapsed}
        with new_file(self.folder / f"resume-{stage.name}.pt") as file:
            torch.save({name: part.state_dict() for name, part in parts.items()} | clock, file)


def rate_at(progress: float, warmup: float) -> float:
    """Share of the highest learning rate: a linear warm-up, then half a cosine down to 2 %."""
    if progress < warmup:
        return progress / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


def run_stage(
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[float], Tensor],
    after_step: Callable[[int], None] | None = None,
    checkpoints: Checkpoints | None = None,
    others: Mapping[str, Stateful] | None = None,
) -> None:
    """Train `model` with Muon and AdamW on `loss_of(progress)` until the stage is over.

    Args:
        stage: receives the losses, every 20 steps their mean, and the number of steps.
        model: what is trained: its parameters that require a gradient.
        loss_of: the loss of a fresh batch; progress goes from 0 to 1.
        after_step: called with the number of steps done.
        checkpoints: where the stage goes on if it was stopped, and keeps its state.
        others: what the checkpoints keep beside model and optimizers, by name.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, stage.learning_rate, stage.weight_decay)
    model.train()
    parts: dict[str, Stateful] = {"model": model, **(others or {})}
    parts |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(optimizers)}
    elapsed = kept = 0.0 if checkpoints is None else checkpoints.load(stage, parts)
    begin, progress = time.perf_counter() - elapsed, stage.progress(elapsed)
    total = torch.zeros((), device=parameters[0].device)
    while progress < 1.0 or stage.steps < 2:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = stage.learning_rate * max(rate_at(progress, stage.warmup), 1e-3)
        loss = loss_of(progress)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
        stage.steps += 1
        if after_step is not None:
            after_step(stage.steps)
        if stage.steps % _REPORT_STEPS == 0:
            stage.losses.append(round(total.item() / _REPORT_STEPS, 5))
            total.zero_()
            if not math.isfinite(stage.losses[-1]):
                raise FloatingPointError(f"{stage.name}: the loss is {stage.losses[-1]} after {stage.steps} steps")
            if len(stage.losses) % 10 == 1:
                print(f"{stage.name}: {progress:.2f} step {stage.steps} loss {stage.losses[-1]:.4f}", flush=True)
        elapsed = time.perf_counter() - begin
        progress = stage.progress(elapsed)
        if checkpoints is not None and checkpoints.seconds and (elapsed - kept > checkpoints.seconds or progress >= 1):
            checkpoints.save(stage, parts, elapsed)
            kept = elapsed
    model.eval()
    print(f"{stage.name}: {stage.steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)


class Average:
    """Moving averages of a model's parameters, one a decay; early steps count less (as in EMA with warm-up)."""

    def __init__(self, model: nn.Module, decays: tuple[float, ...]) -> None:
        self.parameters = list(model.parameters())
        self.decays = decays
        self.copies = [[p.detach().clone() for p in self.parameters] for _ in decays]

    def state_dict(self) -> dict[str, Any]:
        """The averages, by number."""
        return {str(index): copy for index, copy in enumerate(self.copies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take averages that were saved."""
        for index, copy in enumerate(self.copies):
            torch._foreach_copy_(copy, state[str(index)])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after `step` steps in."""
        for decay, copy in zip(self.decays, self.copies, strict=True):
            torch._foreach_lerp_(copy, self.parameters, 1 - min(decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def write_to_model(self, index: int) -> None:
        """Replace the model's parameters by the average of the decay at `index`."""
        for parameter, copy in zip(self.parameters, self.copies[index], strict=True):
            parameter.copy_(copy)
