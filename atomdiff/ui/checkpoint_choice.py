"""The choice of checkpoints of a training, to compare them and to keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.sampling.concept_source import open_source
from atomdiff.ui import library
from atomdiff.ui.comparison import CHECKPOINTS, add_phrase, checkpoint_prompts
from atomdiff.ui.components import showing_errors
from atomdiff.ui.job import Job
from atomdiff.ui.page_concepts import step_name
from atomdiff.ui.workspace import Workspace
from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class CheckpointChoice:
    """A training and some of its steps."""

    training: gr.Dropdown
    steps: gr.CheckboxGroup


def checkpoint_choice(workspace: Workspace, mode: gr.Radio, prompt: gr.Textbox) -> CheckpointChoice:
    """Build the choice, which is shown while checkpoints are compared.

    Args:
        workspace: what the page works with.
        mode: what is compared.
        prompt: to which the trigger phrase is added.
    """
    with gr.Column(visible=False) as box:
        training = gr.Dropdown([], label="Training", interactive=True, elem_id="compared-training")
        steps = gr.CheckboxGroup([], label="Steps", interactive=True, elem_id="compared-steps")
        keep = gr.Button("Add the chosen steps to the library", size="sm", elem_id="keep-steps")

    def show(mode: str) -> list[Any]:
        names = [job.name for job in workspace.jobs.jobs() if job.saved_steps] if mode == CHECKPOINTS else []
        return [gr.update(visible=mode == CHECKPOINTS), gr.update(choices=names, value=names[0] if names else None)]

    @showing_errors
    def choose(name: str | None, prompt: str) -> list[Any]:
        if name is None:
            return [gr.update(choices=[], value=[]), prompt]
        saved = workspace.jobs.job(name).saved_steps
        phrase = open_source(str(next(iter(saved.values())))).trigger_phrase if saved else ""
        return [gr.update(choices=list(saved), value=list(saved)), add_phrase(prompt, phrase) if phrase else prompt]

    @showing_errors
    def add(name: str | None, chosen: list[int]) -> None:
        if name is None or not chosen:
            raise UserError("found no step; choose a training and one of its steps")
        saved = workspace.jobs.job(name).saved_steps
        names = [library.add(workspace.library, saved[step], None) for step in chosen if step in saved]
        gr.Info(f"In the library: {', '.join(names)}.")

    mode.change(show, [mode], [box, training], show_progress="hidden")
    training.change(choose, [training, prompt], [steps, prompt], show_progress="hidden")
    keep.click(add, [training, steps])
    return CheckpointChoice(training, steps)


def chosen_prompts(workspace: Workspace, prompt: str, training: str | None, steps: Sequence[int]) -> dict[str, str]:
    """Return the prompt of each chosen checkpoint, by its label.

    Raises:
        UserError: there is no such training, the prompt's tags cannot be read, or the library has another concept of
            the name of a checkpoint.
    """
    if training is None:
        return {}
    job = workspace.jobs.job(training)
    names = {}
    for step, file in job.saved_steps.items():
        if step in steps:
            names[f"step {step}"] = name = step_name(job, step)
            if name in workspace.library and not library.holds(workspace.library, name, file):
                raise UserError(f"the library has another concept {name!r} than this training; rename it there")
    return checkpoint_prompts(prompt, _tagged_as(workspace, prompt, job), names)


def _tagged_as(workspace: Workspace, prompt: str, job: Job) -> str:
    """Return what a prompt's tag calls the concept of a job: its name in the library, where its own may be taken."""
    result = job.result
    if result is not None:
        for name in split_tags(prompt)[1]:
            if library.holds(workspace.library, name, result):
                return name
    return job.name
