"""The tab *Train*: photos in, a training job out, and what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr

from atomdiff.training.intermediate import GENERATE_FILE, SAVE_FILE
from atomdiff.ui import render
from atomdiff.ui.components import heading, showing_errors
from atomdiff.ui.job import Job
from atomdiff.ui.photos import Photo, look_at_photo
from atomdiff.ui.progress import read_progress
from atomdiff.ui.recipes import (
    PRESET_HELP,
    check_config,
    combine_options,
    command_line,
    concept_name,
    read_advanced,
    starting_options,
    training_side,
)
from atomdiff.ui.workspace import Workspace
from atomdiff.utils.errors import UserError

_REFRESH = 2.0  # seconds between looks at a run
_NO_JOB = '<div class="card empty">No training yet. Drop a few photos and press Start.</div>'
_ASKED = {
    GENERATE_FILE: "Images follow after the next step.",
    SAVE_FILE: "A checkpoint and a concept follow after the next step; compare it under Try.",
}


@dataclass(frozen=True)
class _Form:
    """What a visitor sets."""

    files: gr.State
    """The photos, in the order in which they were dropped."""
    resolution: gr.State
    """Side of training images by the options under *Advanced*, in pixels; None: unknown."""
    captions: gr.State
    """File of a photo -> what is written in its field, which is built anew whenever the photos change."""
    dropped: gr.File
    cards: gr.Column
    words: list[Any]
    """Class name, trigger word and preset."""
    advanced: gr.Code
    start: gr.Button


@dataclass(frozen=True)
class _JobView:
    """What is shown of a job."""

    seen: gr.State
    """What the right side shows now."""
    chosen: gr.Dropdown
    status: gr.HTML
    generate: gr.Button
    save: gr.Button
    stop: gr.Button
    resume: gr.Button
    images: gr.Gallery
    curve: gr.HTML
    report: gr.HTML
    command_box: gr.Accordion
    command: gr.Code

    @property
    def components(self) -> list[Any]:
        """All, in the order of `_view`."""
        return list(vars(self).values())


def train_tab(workspace: Workspace, page: gr.Blocks) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = _build_form(workspace)
        with gr.Column(scale=6, min_width=320):
            view = _build_view()

    def look(name: str | None, last: Any) -> list[Any]:
        return _view(workspace, name, last)

    _take_photos(form)
    _show_photos(workspace, form, view, look, page)
    _control_jobs(workspace, view, look)
    page.load(lambda: look(None, None), None, view.components, show_progress="hidden")
    gr.Timer(_REFRESH).tick(look, [view.chosen, view.seen], view.components, show_progress="hidden")


def _build_form(workspace: Workspace) -> _Form:
    heading("1. Photos", "Three to ten of one subject, from different sides, in different places.")
    dropped = gr.File(
        file_count="multiple",
        file_types=["image"],
        label="Drop photos here",
        height=140,
        interactive=True,
        elem_id="photos",
    )
    cards = gr.Column()
    heading("2. Words", "What it is, and a rare word that will stand for yours.")
    with gr.Row():
        class_name = gr.Textbox(
            "", label="Class", placeholder="mug, dog, robot ...", interactive=True, elem_id="class-name"
        )
        trigger_word = gr.Textbox("sks", label="Trigger word", interactive=True, elem_id="trigger-word")
    heading("3. Size", "How much is trained.")
    preset = gr.Radio(
        [(f"{name}: {text}", name) for name, text in PRESET_HELP.items()],
        value="default",
        show_label=False,
        interactive=True,
        elem_id="preset",
    )
    options = starting_options(workspace.config)
    with gr.Accordion("Advanced: all options as YAML", open=False):
        advanced = gr.Code(
            options,
            language="yaml",
            show_label=False,
            interactive=True,
            max_lines=24,
            elem_id="advanced",
        )
    start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
    resolution = gr.State(training_side(read_advanced(options)))
    return _Form(
        gr.State([]), resolution, gr.State({}), dropped, cards, [class_name, trigger_word, preset], advanced, start
    )


def _build_view() -> _JobView:
    chosen = gr.Dropdown([], label="Training", interactive=True, elem_id="jobs")
    status = gr.HTML(_NO_JOB, elem_id="status")
    with gr.Row(elem_classes="buttons"):
        generate, save, stop, resume = (
            gr.Button(text, interactive=False, size="md", min_width=90, elem_id=text.lower().replace(" ", "-"))
            for text in ("Generate now", "Save now", "Stop", "Resume")
        )
    images = gr.Gallery(
        show_label=False,
        columns=4,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        visible=False,
        buttons=["download", "fullscreen"],
        elem_id="run-images",
    )
    curve = gr.HTML()
    report = gr.HTML(elem_id="report")
    with gr.Accordion("The same on the command line", open=False, visible=False) as command_box:
        command = gr.Code(language="shell", show_label=False, interactive=False, buttons=["copy"])
    return _JobView(
        gr.State(), chosen, status, generate, save, stop, resume, images, curve, report, command_box, command
    )


def _take_photos(form: _Form) -> None:
    """Take the photos that are dropped, and the resolution whenever the options may have changed."""

    @showing_errors
    def read_resolution(advanced: str) -> int | None:
        return training_side(read_advanced(advanced))

    @showing_errors
    def add_photos(dropped: Sequence[str] | None, files: list[Path], advanced: str) -> tuple[list[Path], None, Any]:
        new = [file for file in map(Path, dropped or ()) if file not in files]
        return files + new, None, read_resolution(advanced)

    form.dropped.upload(
        add_photos, [form.dropped, form.files, form.advanced], [form.files, form.dropped, form.resolution]
    )
    form.advanced.blur(
        read_resolution, [form.advanced], [form.resolution], show_progress="hidden", trigger_mode="always_last"
    )


def _show_photos(
    workspace: Workspace, form: _Form, view: _JobView, look: Callable[[str | None, Any], list[Any]], page: gr.Blocks
) -> None:
    """Show the photos with their captions; and let the button start a training with those that can be used."""
    looked_at = lru_cache(maxsize=64)(look_at_photo)  # uploads never change
    with form.cards:

        @gr.render(
            inputs=[form.files, form.resolution, form.captions],
            triggers=[page.load, form.files.change, form.resolution.change],
        )
        def show(files: list[Path], resolution: int | None, written: dict[Path, str]) -> None:
            photos = [looked_at(file, resolution) for file in files]
            captions = [_show_photo(photo, form, written.get(photo.file, "")) for photo in photos]
            usable = [photo.file for photo in photos if photo.can_be_used]
            captions = [caption for caption, photo in zip(captions, photos, strict=True) if photo.can_be_used]

            @showing_errors
            def start_training(class_name: str, trigger_word: str, preset: str, advanced: str, *texts: str) -> Any:
                images = list(zip(usable, texts, strict=True))
                return look(add_job(workspace, images, class_name, trigger_word, preset, advanced).name, None)

            form.start.click(start_training, [*form.words, form.advanced, *captions], view.components)


def _show_photo(photo: Photo, form: _Form, written: str) -> gr.Textbox:
    """Show a photo, and return the field of its caption."""
    with gr.Row(equal_height=False, elem_classes="photo"):
        if photo.thumbnail is not None:
            gr.Image(
                photo.thumbnail,
                show_label=False,
                interactive=False,
                buttons=[],
                height=72,
                scale=1,
                min_width=72,
            )
        with gr.Column(scale=4, min_width=160):
            caption = gr.Textbox(
                written,
                label="Caption (optional)",
                info=photo.note or None,
                lines=1,
                interactive=True,
                visible=photo.can_be_used,
            )
            caption.change(
                lambda text, captions: {**captions, photo.file: text},
                [caption, form.captions],
                [form.captions],
                show_progress="hidden",
            )
            if not photo.can_be_used:
                gr.Markdown(f"**{photo.file.name}** {photo.note}", elem_classes="note")
        remove = gr.Button("Remove", size="sm", scale=0, min_width=80)
        remove.click(lambda files: [file for file in files if file != photo.file], [form.files], [form.files])
    return caption


def _control_jobs(workspace: Workspace, view: _JobView, look: Callable[[str | None, Any], list[Any]]) -> None:
    @showing_errors
    def ask(request: str, name: str) -> None:
        workspace.jobs.ask(workspace.jobs.job(name), request)
        gr.Info(_ASKED[request])

    @showing_errors
    def stop_job(name: str) -> list[Any]:
        workspace.jobs.stop(workspace.jobs.job(name))
        return look(name, None)

    @showing_errors
    def resume_job(name: str) -> list[Any]:
        workspace.jobs.resume(workspace.jobs.job(name))
        return look(name, None)

    view.generate.click(partial(ask, GENERATE_FILE), [view.chosen], None)
    view.save.click(partial(ask, SAVE_FILE), [view.chosen], None)
    view.stop.click(stop_job, [view.chosen], view.components)
    view.resume.click(resume_job, [view.chosen], view.components)
    view.chosen.input(lambda name: look(name, None), [view.chosen], view.components, show_progress="hidden")


def add_job(
    workspace: Workspace,
    images: Sequence[tuple[Path, str]],
    class_name: str,
    trigger_word: str,
    preset: str,
    advanced: str,
) -> Job:
    """Add a training job.

    Args:
        workspace: whose queue it joins.
        images: photos and their captions.
        class_name: what the photos show.
        trigger_word: the word for it.
        preset: of `PRESETS`.
        advanced: options as YAML.

    Raises:
        UserError: a field, an option or a photo cannot be used; nothing was added.
    """
    if not images:
        raise UserError("found no photo; drop at least one of the subject, better three to ten")
    options = combine_options(class_name, trigger_word, preset, advanced, len(images))
    resolution = training_side(options)
    for file, _ in images:
        photo = look_at_photo(file, resolution)
        if not photo.can_be_used:
            raise UserError(f"{photo.file.name} {photo.note}")
    return workspace.jobs.add(concept_name(class_name, trigger_word), images, options, check_config)


def _view(workspace: Workspace, name: str | None, last: Any) -> list[Any]:
    """Return what the right side shows of a job, by default the newest; nothing where all is as it was."""
    jobs = workspace.jobs.jobs()
    job = next((job for job in jobs if job.name == name), jobs[0] if jobs else None)
    if job is None:
        return [None, gr.update(choices=[], value=None), _NO_JOB, *[gr.skip()] * 9]
    progress, statuses = read_progress(job.run_folder), {each: each.status for each in jobs}
    status, error = statuses[job], workspace.jobs.hand_over_error(job)
    now = [job.name, [*statuses.values()], progress.step, len(progress.measurements), len(progress.images)]
    now += [progress.report is not None, job.last_line, error]
    if now == last:
        return [gr.skip()] * 12
    choices = [(f"{each.name} · {statuses[each]} · {_date(each)}", each.name) for each in jobs]
    shown = [(str(file), f"step {step}") for step, file in progress.images]
    return [
        now,
        gr.update(choices=choices, value=job.name),
        render.status_card(job, progress, error),
        gr.update(interactive=status == "running"),
        gr.update(interactive=status == "running"),
        gr.update(interactive=status in ("queued", "running")),
        gr.update(interactive=status in ("stopped", "failed")),
        gr.update(value=shown, visible=bool(shown)),
        render.curves(progress),
        render.findings(progress) if status == "finished" else "",
        gr.update(visible=True),
        command_line(job.config_file),
    ]


def _date(job: Job) -> str:
    return time.strftime("%b %d, %H:%M", time.localtime(job.created))
