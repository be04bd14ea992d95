"""The schedule of the base's images: that of the concept that they are compared with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.subjects import Subject
from atomdiff.pipelines.scheduler import ScheduleConfig, schedule_settings
from atomdiff.sampling.concept_source import schedules
from atomdiff.utils.assets import find_asset


def schedule_of(subject: Subject, config: EvaluateConfig) -> ScheduleConfig:
    """Return in what a subject's images are generated otherwise than the base generates by itself.

    Only configs are read. Of a base whose config cannot be read so, all that is known of the subject counts.
    """
    if subject.concept is None:
        trained = ScheduleConfig.read({"config": _settings(str(subject.path), None)})
    else:
        known = schedules([(subject.concept, subject.weight)])
        trained = known[0][1] if known else ScheduleConfig()
    values = {name: value for name, value in asdict(trained).items() if value is not None}
    of_base = _settings(config.pretrained_model_name_or_path, config.revision) if values else {}
    asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
    differing = {name: value for name, value in values.items() if value != of_base.get(name)}
    found = ScheduleConfig(**differing).overridden(asked)
    return ScheduleConfig() if found == asked else found


def describe_schedule(schedule: ScheduleConfig) -> str:
    """Return a schedule as a part of a folder's name; empty, if it is the base's."""
    return ",".join(f"{name}={value}" for name, value in asdict(schedule).items() if value is not None)


def _settings(name: str, revision: str | None) -> dict[str, Any]:
    """Return the settings of a pipeline's scheduler; nothing, if its config cannot be read."""
    import diffusers

    try:
        config = diffusers.DDIMScheduler.load_config(find_asset(name), subfolder="scheduler", revision=revision)
        return schedule_settings(getattr(diffusers, config["_class_name"]).from_config(config))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}
