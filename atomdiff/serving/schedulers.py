"""Schedulers for which the rows of a batch can be at different steps: each row has one of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler of diffusers, with one call of the denoiser a step."""

    class_name: str
    """Its class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options that differ from the base's scheduler."""
    webui_name: str = ""
    """What AUTOMATIC1111's WebUI calls it."""


SCHEDULERS: dict[str, SchedulerSpec] = {
    "ddim": SchedulerSpec("DDIMScheduler", webui_name="DDIM"),
    "euler": SchedulerSpec("EulerDiscreteScheduler", webui_name="Euler"),
    "euler_ancestral": SchedulerSpec("EulerAncestralDiscreteScheduler", webui_name="Euler a"),
    "dpm++_2m": SchedulerSpec(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}, "DPM++ 2M"
    ),
    "dpm++_2m_karras": SchedulerSpec(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
        "DPM++ 2M Karras",
    ),
    "unipc": SchedulerSpec("UniPCMultistepScheduler", webui_name="UniPC"),
    "pndm": SchedulerSpec("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
}
_CLASSES = {spec.class_name for spec in SCHEDULERS.values()} | {"FlowMatchEulerDiscreteScheduler"}
_STOCHASTIC = ("sde-dpmsolver", "sde-dpmsolver++")  # their noise comes from a tree over all steps


def check_scheduler(scheduler: Any) -> Any:
    """Return a scheduler if its rows can be at different steps.

    Raises:
        UserError: they cannot.
    """
    kind, algorithm = type(scheduler).__name__, scheduler.config.get("algorithm_type")
    if kind in _CLASSES and algorithm not in _STOCHASTIC:
        return scheduler
    found = f"{kind} with {algorithm}" if kind in _CLASSES else kind
    expected = f"one of {', '.join(SCHEDULERS)}"
    raise UserError(f"the base's scheduler is {found}, whose rows cannot be at different steps: choose {expected}")


def named_scheduler(name: str, base: Any) -> Any:
    """Return the scheduler of a name, with the noise schedule and the prediction type of a base's scheduler.

    Raises:
        UserError: it has no such noise schedule.
    """
    import diffusers

    spec = SCHEDULERS[name]
    kind = getattr(diffusers, spec.class_name)
    if base.config.get("prediction_type", "flow") == "flow":
        raise UserError(f"scheduler={name!r}: this model predicts flow; leave the scheduler out")
    accepted = inspect.signature(kind.__init__).parameters
    if base.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        able = [
            other
            for other, each in SCHEDULERS.items()
            if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, each.class_name).__init__).parameters
        ]
        found = f"{spec.class_name} knows no noise schedule of zero terminal SNR, which this model has"
        raise UserError(f"scheduler={name!r}: {found}; choose one of {', '.join(able)}, or leave it out")
    return kind.from_config(base.config, **spec.options)


def own_scheduler(scheduler: Any) -> Any:
    """Return a scheduler of the same settings with a state of its own."""
    return type(scheduler).from_config(scheduler.config)
