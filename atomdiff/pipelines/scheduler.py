"""Schedulers that generate images the way a concept was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from atomdiff.bases.find import find_base
from atomdiff.bases.noise_schedule import prediction_type
from atomdiff.concepts.training_record import training_record
from atomdiff.utils.choices import FLOW_SHIFTS, PredictionType
from atomdiff.utils.errors import UserError, warn
from atomdiff.utils.fields import ConfigGroup


@dataclass(frozen=True)
class ScheduleConfig(ConfigGroup):
    """Prediction type and noise schedule of a run; None: as in the config of the base's scheduler."""

    prediction_type: PredictionType | None = None
    """What the denoiser predicts."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the noise schedule ends in pure noise."""
    flow_shift: float | None = None
    """Shift of the noise levels of flow towards pure noise."""

    @classmethod
    def read(cls, training: Mapping[str, Any]) -> ScheduleConfig:
        """Return what the metadata of a run in a concept file says; values that cannot be are left out."""
        recorded = training.get("config")
        config: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
        predicted, zero_snr = config.get("prediction_type"), config.get("rescale_betas_zero_snr")
        shift: Any = config.get("flow_shift")
        return cls(
            predicted if predicted in get_args(PredictionType) else None,
            zero_snr if isinstance(zero_snr, bool) else None,
            float(shift) if type(shift) in (int, float) and FLOW_SHIFTS[0] <= shift <= FLOW_SHIFTS[1] else None,
        )

    def overridden(self, asked: ScheduleConfig) -> ScheduleConfig:
        """Return this with the prediction type and zero terminal SNR of another, where it has them.

        A new prediction type removes what does not apply to it: the shift, or zero terminal SNR.
        """
        predicted, zero_snr = asked.prediction_type, asked.rescale_betas_zero_snr
        flow = predicted == "flow"
        return ScheduleConfig(
            predicted or self.prediction_type,
            zero_snr if zero_snr is not None or flow else self.rescale_betas_zero_snr,
            self.flow_shift if predicted is None or flow else None,
        )


def trained_schedule(path: Path) -> ScheduleConfig | None:
    """Return the schedule of a concept: of its file, or of a directory written by PEFT; only headers are read.

    None: nothing is known of its training.
    """
    record = training_record(path)
    return None if record is None else ScheduleConfig.read(record)


def fitting_scheduler(schedule: ScheduleConfig, scheduler: Any) -> Any:
    """Return the scheduler itself if it generates as trained, else one in its place that does.

    Raises:
        UserError: as `matching_scheduler`.
    """
    matching = scheduler if schedule == ScheduleConfig() else matching_scheduler(schedule, scheduler)
    return scheduler if schedule_settings(matching) == schedule_settings(scheduler) else matching


def common_scheduler(
    concepts: Iterable[tuple[str, ScheduleConfig]],
    scheduler: Any,
    asked: ScheduleConfig = ScheduleConfig(),
    advice: str = "",
) -> Any:
    """Return the base's scheduler if it generates all concepts as trained, else one in its place that does.

    `asked` is set for all in place of their own; `advice` says what to do where they need different ones.

    Raises:
        UserError: they need different ones, or the base can have none for one of them.
    """
    fitting = []
    for name, schedule in concepts:
        try:
            fitting.append((name, fitting_scheduler(schedule.overridden(asked), scheduler)))
        except UserError as error:
            raise UserError(f"no scheduler can sample the concept {name!r}: {error}") from error
    common = fitting[0][1] if fitting else fitting_scheduler(asked, scheduler)
    if any(schedule_settings(other) != schedule_settings(common) for _, other in fitting):
        needs = ", ".join(f"{name!r} for {describe_scheduler(other)}" for name, other in fitting)
        raise UserError(f"these concepts need different schedulers: {needs}; {advice}")
    return common


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """Return the prediction type and noise schedule of a scheduler, by the names of the options of a run."""
    config, predicted = scheduler.config, prediction_type(scheduler)
    if predicted == "flow":
        return {"prediction_type": predicted, "flow_shift": config.get("shift", config.get("flow_shift", 1.0))}
    return {"prediction_type": predicted, "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr"))}


def describe_scheduler(scheduler: Any) -> str:
    """Return a scheduler's class and settings, for people to read."""
    settings = ", ".join(f"{key}={value}" for key, value in schedule_settings(scheduler).items())
    return f"a {type(scheduler).__name__} with {settings}"


def pipeline_scheduler(pipe: Any, scheduler: Any) -> Any:
    """Return the scheduler, or what a pipeline can use in place of a flow scheduler that does not suit it.

    Its first-order steps are Euler's, too. Its noise levels are spaced evenly down to zero (before the shift), where
    FlowMatchEuler's last step but one ends next to zero: with few steps the images differ somewhat. Diffusers fails
    where (shift - 1) * steps comes to 1000, as its first timesteps, which are whole here, coincide.
    """
    if find_base(pipe.components).takes_flow_scheduler or not type(scheduler).__name__.startswith("FlowMatch"):
        return scheduler
    from diffusers import DPMSolverMultistepScheduler

    steps, shift = scheduler.config.num_train_timesteps, scheduler.config.shift
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    unused = {"steps_offset": 1}  # Stable Diffusion's pipelines warn of another
    return DPMSolverMultistepScheduler(num_train_timesteps=steps, solver_order=1, **flow, **unused)


def scheduler_code(wanted: Any, scheduler: Any) -> str:
    """Return the Python that gives a pipeline, `pipe`, with this scheduler the wanted one, from `fitting_scheduler`."""
    kind, flow = type(wanted), prediction_type(wanted) == "flow"
    plain = (kind() if flow else kind.from_config(scheduler.config)).config
    changes = [f"{key}={value!r}" for key, value in wanted.config.items() if key[0] != "_" and plain[key] != value]
    start = f"{kind.__name__}(" if flow else f"{kind.__name__}.from_config(pipe.scheduler.config, "
    return f"pipe.scheduler = diffusers.{start}{', '.join(changes)})"


def warn_of_scheduler(pipe: Any, name: str, schedule: ScheduleConfig) -> None:
    """Warn if a pipeline's scheduler does not fit what a concept was trained to predict, with the line that helps."""
    if (scheduler := pipe.components.get("scheduler")) is None:
        return
    try:
        fitting = fitting_scheduler(schedule, scheduler)
    except UserError as error:
        warn(f"{name!r} was trained with another scheduler than this pipeline can have: {error}")
        return
    if fitting is not scheduler:
        fitting = pipeline_scheduler(pipe, fitting)
        warn(
            f"{name!r} was trained for {describe_scheduler(fitting)}, but the pipeline has "
            f"{describe_scheduler(scheduler)}; run\nimport diffusers; {scheduler_code(fitting, scheduler)}"
        )


def matching_scheduler(schedule: ScheduleConfig, scheduler: Any) -> Any:
    """Return the base's scheduler where it does as the run wants, else a DDIM or flow scheduler that does.

    Zero terminal SNR, and that images are then generated from the last timestep on ("trailing"): Lin et al., "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, algorithm 1 and section 3.3.

    Raises:
        UserError: the run's prediction type, zero terminal SNR or shift does not fit the base's scheduler.
    """
    from diffusers import DDIMScheduler

    kind, base_type, base = type(scheduler).__name__, prediction_type(scheduler), scheduler.config
    predicted = schedule.prediction_type or base_type
    if predicted not in get_args(PredictionType):
        found, known = f"the base's {kind} says prediction_type={base_type!r}", ", ".join(get_args(PredictionType))
        raise UserError(f"{found}; choose one with prediction_type: {known}")
    if predicted == "flow":
        return _flow_scheduler(schedule, scheduler)
    if schedule.flow_shift is not None:
        found = f"flow_shift={schedule.flow_shift}: the base predicts {predicted}"
        raise UserError(f"{found}; expected prediction_type flow")
    if base_type == "flow" or not hasattr(scheduler, "alphas_cumprod"):
        found = f"the base's {kind} has no noise schedule of diffusion (alphas_cumprod)"
        advice = "take a base with a DDIMScheduler, or prediction_type flow"
        raise UserError(f"prediction_type={predicted!r}: {found}; {advice}")
    base_zero_snr = bool(base.get("rescale_betas_zero_snr"))
    zero_snr = base_zero_snr if schedule.rescale_betas_zero_snr is None else schedule.rescale_betas_zero_snr
    if zero_snr and predicted == "epsilon":
        found = "at zero terminal SNR the base's epsilon does not determine the image"
        raise UserError(f"rescale_betas_zero_snr=True: {found}; set it to false, or prediction_type to v_prediction")
    spacing = "trailing" if zero_snr else base.get("timestep_spacing")
    if (predicted, zero_snr, spacing) == (base_type, base_zero_snr, base.get("timestep_spacing")):
        return scheduler
    changes = {"prediction_type": predicted, "rescale_betas_zero_snr": zero_snr, "clip_sample": False}
    return DDIMScheduler.from_config(base, **changes, **({"timestep_spacing": spacing} if spacing else {}))


def _flow_scheduler(schedule: ScheduleConfig, scheduler: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    base = scheduler.config
    if schedule.rescale_betas_zero_snr:
        raise UserError("rescale_betas_zero_snr=True: expected no value, as flow ends in pure noise anyway")
    shift = schedule_settings(scheduler).get("flow_shift", 1.0) if schedule.flow_shift is None else schedule.flow_shift
    same = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not base.use_dynamic_shifting
    if not same or base.shift != shift:
        steps = base.get("num_train_timesteps", 1000)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    return scheduler
