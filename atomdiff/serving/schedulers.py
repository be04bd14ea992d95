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


def _dpm_solver(algorithm: str, webui_name: str) -> SchedulerSpec:
    options = {"algorithm_type": algorithm, "solver_order": 2, "use_karras_sigmas": webui_name.endswith("Karras")}
    return SchedulerSpec("DPMSolverMultistepScheduler", options, webui_name)


SCHEDULERS: dict[str, SchedulerSpec] = {
    "ddim": SchedulerSpec("DDIMScheduler", webui_name="DDIM"),
    "euler": SchedulerSpec("EulerDiscreteScheduler", webui_name="Euler"),
    "euler_ancestral": SchedulerSpec("EulerAncestralDiscreteScheduler", webui_name="Euler a"),
    "dpm++_2m": _dpm_solver("dpmsolver++", "DPM++ 2M"),
    "dpm++_2m_karras": _dpm_solver("dpmsolver++", "DPM++ 2M Karras"),
    "dpm++_2m_sde": _dpm_solver("sde-dpmsolver++", "DPM++ 2M SDE"),
    "dpm++_2m_sde_karras": _dpm_solver("sde-dpmsolver++", "DPM++ 2M SDE Karras"),
    "unipc": SchedulerSpec("UniPCMultistepScheduler", webui_name="UniPC"),
    "pndm": SchedulerSpec("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
}
_CLASSES = {spec.class_name for spec in SCHEDULERS.values()} | {"FlowMatchEulerDiscreteScheduler"}


def check_scheduler(scheduler: Any) -> Any:
    """Return a scheduler if its rows can be at different steps.

    Raises:
        UserError: they cannot.
    """
    kind = type(scheduler).__name__
    if kind in _CLASSES:
        return scheduler
    expected = f"one of {', '.join(SCHEDULERS)}"
    raise UserError(f"the base's scheduler is {kind}, whose rows cannot be at different steps: choose {expected}")


def named_scheduler(name: str, base: Any) -> Any:
    """Return the scheduler of a name, with the noise schedule and the prediction type of a base's scheduler.

    Raises:
        UserError: it has no such noise schedule.
    """
    spec = SCHEDULERS[name]
    if base.config.get("prediction_type", "flow") == "flow":
        raise UserError(f"scheduler={name!r}: this model predicts flow; leave the scheduler out")
    if base.config.get("rescale_betas_zero_snr") and not _knows_zero_snr(spec):
        able = ", ".join(other for other, each in SCHEDULERS.items() if _knows_zero_snr(each))
        found = f"{spec.webui_name} has no noise schedule of zero terminal SNR, which this model needs"
        raise UserError(f"scheduler={name!r}: {found}; choose one of {able}, or leave it out")
    return _class_of(spec).from_config(base.config, **spec.options)


def _class_of(spec: SchedulerSpec) -> Any:
    import diffusers

    return getattr(diffusers, spec.class_name)


def _knows_zero_snr(spec: SchedulerSpec) -> bool:
    """Tell whether a scheduler has a noise schedule of zero terminal SNR."""
    return "rescale_betas_zero_snr" in inspect.signature(_class_of(spec).__init__).parameters


def own_scheduler(scheduler: Any) -> Any:
    """Return a scheduler of the same settings with a state of its own."""
    return type(scheduler).from_config(scheduler.config)
