"""Adapter weights by denoising step: weights are written again before each step at which they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from atomdiff.bases.find import denoiser_of
from atomdiff.pipelines.caller import find_caller
from atomdiff.pipelines.hooks import Hook, before_calls
from atomdiff.utils.threads import CallLock, ThreadLocal

_ATTRIBUTE = "_atomdiff_schedule"  # of the denoiser whose weights it writes


class StepSchedule:
    """Calls a function with the share of the denoising steps done, before each step at which it changes.

    Threads take turns: what the function writes into the model is for the call of one of them.
    """

    def __init__(
        self,
        pipe: Any,
        apply: Callable[[float], None],
        when: Callable[[Hook], Hook] = lambda hook: hook,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_stop = on_stop  # called by `stop_schedule`
        self.paused = ThreadLocal()  # calls of a thread whose value is true are passed over
        self._pipe, self._apply = pipe, apply
        self._last: float | None = None
        self._turn = CallLock()
        self.remove = before_calls(denoiser_of(pipe), when(self._before), self._after)

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.paused.value:
            return
        self._turn.take(model)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        caller = find_caller(model)
        scheduler = (caller.pipe if caller else self._pipe).scheduler
        steps = getattr(scheduler, "timesteps", None)
        if timestep is None or steps is None or len(steps) == 0:
            return
        now = float(timestep.reshape(-1)[0] if hasattr(timestep, "reshape") else timestep)
        scales = 1, scheduler.config.get("num_train_timesteps", 1)  # some transformers get them from 0 to 1
        distances = [(steps.float() - now * scale).abs().min(0) for scale in scales]
        nearest = min(distances, key=lambda distance: distance.values)
        progress = int(nearest.indices) / max(len(steps) - 1, 1)
        if progress != self._last:
            self._last = None  # if it fails, nobody knows what has been written
            self._apply(progress)
            self._last = progress

    def _after(self, *_: Any) -> None:
        self._turn.give()


def start_schedule(pipe: Any, apply: Callable[[float], None], on_stop: Callable[[], None]) -> None:
    """Let a function write the weights of a pipeline's denoiser before its steps, until `stop_schedule`.

    Args:
        pipe: the pipeline.
        apply: writes the weights, given the share of the steps that are done.
        on_stop: called at the end.
    """
    model = denoiser_of(pipe)
    vars(getattr(model, "_orig_mod", model))[_ATTRIBUTE] = StepSchedule(pipe, apply, on_stop=on_stop)


def schedule_of(model: nn.Module) -> StepSchedule | None:
    """The schedule by which the weights of a model are written; None: there is none."""
    schedule: StepSchedule | None = vars(model).get(_ATTRIBUTE)
    return schedule


def stop_schedule(models: Iterable[nn.Module]) -> None:
    """Stop writing weights before denoising steps; those of the last one stay."""
    for model in models:
        if (schedule := vars(model).pop(_ATTRIBUTE, None)) is not None:
            schedule.remove()
            schedule.on_stop()
