"""The scheduler that each prompt of a sampling job is generated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atomdiff.pipelines.scheduler import (
    ScheduleConfig,
    common_scheduler,
    describe_scheduler,
    fitting_scheduler,
    schedule_settings,
)
from atomdiff.sampling.concept_source import schedules
from atomdiff.sampling.prompt_requests import PromptRequest
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some


def choose_schedulers(base: Any, requests: Sequence[PromptRequest], asked: ScheduleConfig) -> dict[PromptRequest, Any]:
    """Choose a scheduler for each request: as asked, else as its concepts were trained; the base's own where it fits.

    A request with schedules of its own is generated like those.

    Args:
        base: the base's scheduler.
        requests: the prompts with their concepts.
        asked: what the user sets for all images.

    Raises:
        UserError: the base has no such scheduler, or concepts of one prompt need different ones.
    """
    advice = "use them in separate prompts, or set prediction_type and rescale_betas_zero_snr for all"
    made, chosen = {str(schedule_settings(base)): base}, {}
    for request in requests:
        try:
            wanted = [*schedules(request.concepts), *request.schedules]
            scheduler = common_scheduler(wanted, base, asked, advice)
        except UserError as error:
            raise UserError(f"the prompt {request.prompt!r}: {error}") from error
        chosen[request] = made.setdefault(str(schedule_settings(scheduler)), scheduler)
    return chosen


def print_schedulers(base: Any, schedulers: Mapping[PromptRequest, Any]) -> None:
    """Print which concepts use another scheduler than the base's, or than they were trained for."""
    names_by_note: dict[str, list[str]] = {}
    for request, scheduler in schedulers.items():
        used: list[tuple[str, ScheduleConfig | None]] = [*schedules(request.concepts)] or [("the base", None)]
        for name, schedule in used:
            notes = [f"generated with {describe_scheduler(scheduler)}"]
            notes += [] if scheduler is base else [f"the base has {describe_scheduler(base)}"]
            notes += [] if schedule is None else _training_note(schedule, base, scheduler)
            if len(notes) > 1:
                names_by_note.setdefault("; ".join(notes), []).append(name)
    for note, names in names_by_note.items():
        print(f"{list_some(list(dict.fromkeys(names)))}: {note}")


def _training_note(schedule: ScheduleConfig, base: Any, scheduler: Any) -> list[str]:
    try:
        trained_with = fitting_scheduler(schedule, base)
    except UserError as error:
        return [f"trained with one that the base cannot have ({error})"]
    same = schedule_settings(trained_with) == schedule_settings(scheduler)
    return [] if same else [f"trained for {describe_scheduler(trained_with)}"]
