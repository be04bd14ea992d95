"""The tab *Try*: prompts with concepts, beside each other with the same seed, over seeds, weights or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.prompt_syntax import has_word, split_tags
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.schedulers import SCHEDULERS
from atomdiff.ui import render
from atomdiff.ui.checkpoint_choice import CheckpointChoice, checkpoint_choice, chosen_prompts
from atomdiff.ui.comparison import CHECKPOINTS, MODES, SEEDS, add_phrase, choose_concepts, consecutive_seeds, plan
from atomdiff.ui.components import heading, showing_errors
from atomdiff.ui.images import ImageRun
from atomdiff.ui.recipes import starting_sampling
from atomdiff.ui.weights import RANGE, WEIGHT, move, position, sliders_of, tag_value
from atomdiff.ui.workspace import Workspace
from atomdiff.utils.errors import UserError

_MAX_IMAGES = 16
_NOT_CHOSEN = '<div class="empty">Press an image.</div>'


@dataclass(frozen=True)
class _Form:
    """What a visitor sets."""

    concepts: gr.Dropdown
    tags: gr.State
    """Name -> weight as in the prompt's tags, of the concepts whose sliders are shown."""
    sliders: gr.Column
    chips: gr.Row
    prompt: gr.Textbox
    mode: gr.Radio
    checkpoints: CheckpointChoice
    sampling: list[Any]
    """Number of seeds, first seed, negative prompt, steps, guidance and scheduler."""
    generate: gr.Button
    stop: gr.Button


@dataclass(frozen=True)
class _Results:
    """What a visitor gets."""

    progress: gr.HTML
    images: gr.Gallery
    metadata: gr.HTML
    files: gr.State
    """Of the images; paths are never taken from the browser."""
    run: gr.State
    """The `ImageRun` that makes them."""


def try_tab(workspace: Workspace, page: gr.Blocks) -> None:
    """Build the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = _build_form(workspace)
        with gr.Column(scale=6, min_width=320):
            results = _build_results()
    _keep_prompt_and_choices_equal(workspace, form, page)
    _show_sliders(workspace, form)
    _show_chips(workspace, form)
    _make_images(workspace, form, results)


def _build_form(workspace: Workspace) -> _Form:
    heading("Concepts", "From the library; several may act together.")
    concepts = gr.Dropdown(
        [], multiselect=True, show_label=False, container=False, interactive=True, elem_id="concepts"
    )
    sliders = gr.Column()
    heading("Prompt", "Press a trigger phrase to add it. The tags say which concepts act, and how much.")
    chips = gr.Row(elem_classes="chips")
    prompt = gr.Textbox(
        "",
        lines=3,
        show_label=False,
        container=False,
        placeholder="a photo of ...",
        interactive=True,
        elem_id="prompt",
    )
    mode = gr.Radio(list(MODES), value=SEEDS, label="Compare", interactive=True, elem_id="mode")
    checkpoints = checkpoint_choice(workspace, mode, prompt)
    sampling = _build_sampling(starting_sampling(workspace.config))
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", size="lg", scale=3, elem_id="generate")
        stop = gr.Button("Stop", size="lg", scale=1, min_width=90, interactive=False, elem_id="stop-images")
    return _Form(concepts, gr.State({}), sliders, chips, prompt, mode, checkpoints, sampling, generate, stop)


def _build_sampling(usual: dict[str, Any]) -> list[Any]:
    with gr.Row():
        count = gr.Slider(1, _MAX_IMAGES, value=4, step=1, label="Seeds", interactive=True, elem_id="count")
        seed = gr.Number(0, label="First seed", precision=0, minimum=0, interactive=True, elem_id="seed")
    with gr.Accordion("More", open=False):
        negative = gr.Textbox("", label="Negative prompt", placeholder="none", interactive=True)
        with gr.Row():
            steps = gr.Slider(
                1,
                100,
                value=usual["num_inference_steps"],
                step=1,
                label="Steps",
                interactive=True,
                elem_id="sampling-steps",
            )
            guidance = gr.Slider(1, 20, value=usual["guidance_scale"], step=0.5, label="Guidance", interactive=True)
        names = [("the base's own", ""), *((name, name) for name in SCHEDULERS)]
        scheduler = gr.Dropdown(names, value="", label="Scheduler", interactive=True)
    return [count, seed, negative, steps, guidance, scheduler]


def _build_results() -> _Results:
    progress = gr.HTML(elem_id="progress")
    images = gr.Gallery(
        show_label=False,
        columns=3,
        object_fit="contain",
        format="png",
        interactive=False,
        height="auto",
        buttons=["download", "download_all", "fullscreen"],
        elem_id="images",
    )
    with gr.Accordion("How the chosen image was made", open=True):
        metadata = gr.HTML(_NOT_CHOSEN, elem_id="metadata")
    results = _Results(progress, images, metadata, gr.State([]), gr.State())
    images.select(_describe, [results.files], [metadata])
    return results


@showing_errors
def _describe(made: list[str], event: gr.SelectData) -> str:
    with Image.open(made[event.index]) as image:
        return render.table({str(key): value for key, value in image.info.items() if isinstance(value, str) and value})


def _keep_prompt_and_choices_equal(workspace: Workspace, form: _Form, page: gr.Blocks) -> None:
    """Write choices of concepts into the prompt's tags, and tags that are written by hand into the choices."""

    def known_tags(prompt: str) -> dict[str, Any]:
        weights = split_tags(prompt)[1]
        return {name: tag_value(weight) for name, weight in weights.items() if name in workspace.library}

    @showing_errors
    def choose(names: list[str], prompt: str) -> list[Any]:
        prompt = choose_concepts(prompt, names, workspace.library)
        return [prompt, known_tags(prompt)]

    @showing_errors
    def read(prompt: str) -> list[Any]:
        tags = known_tags(prompt)
        return [gr.update(value=list(tags)), tags]

    def refresh() -> Any:  # of the choices alone: what is chosen may change meanwhile
        workspace.library.refresh()
        return gr.update(choices=list(workspace.library))

    form.concepts.input(choose, [form.concepts, form.prompt], [form.prompt, form.tags], show_progress="hidden")
    form.prompt.blur(read, [form.prompt], [form.concepts, form.tags], show_progress="hidden")
    form.concepts.focus(refresh, None, [form.concepts], show_progress="hidden")
    page.load(refresh, None, [form.concepts], show_progress="hidden")


def _show_sliders(workspace: Workspace, form: _Form) -> None:
    """Show the sliders of the concepts in the prompt's tags, which they write."""

    def add(name: str, slider: str, label: str, weight: AdapterWeight) -> None:
        @showing_errors
        def change(value: float | None, prompt: str) -> Any:
            return gr.skip() if value is None else move(prompt, name, slider, value)

        @showing_errors
        def leave(value: float | None, prompt: str) -> str:
            return move(prompt, name, slider, value or 0.0)

        added = gr.Slider(*RANGE, position(weight, slider), step=0.05, label=label, min_width=210, interactive=True)
        # The number box sends what is typed as it is: nothing, once it is emptied, or a number beyond the ends.
        for event, function in ((added.input, change), (added.release, leave)):
            event(
                function,
                [added, form.prompt],
                [form.prompt],
                show_progress="hidden",
                trigger_mode="always_last",
                preprocess=False,
            )

    with form.sliders:

        @gr.render(inputs=[form.tags])
        def show(tags: dict[str, Any]) -> None:
            for name, value in tags.items():
                weight = AdapterWeight.read(value)
                add(name, WEIGHT, name, weight)
                try:
                    further = sliders_of(workspace.library, name)
                except UserError as error:
                    gr.Markdown(str(error), elem_classes="note")
                    continue
                if further:
                    with gr.Accordion(f"By block and over the steps: {name}", open=not weight.is_plain):
                        with gr.Row(elem_classes="further"):
                            for slider, label in further.items():
                                add(name, slider, label, weight)


def _show_chips(workspace: Workspace, form: _Form) -> None:
    """Show the trigger phrases of the chosen concepts as buttons."""

    @showing_errors
    def press(phrase: str, prompt: str) -> str:
        return add_phrase(prompt, phrase)

    with form.chips:

        @gr.render(inputs=[form.tags])
        def show(tags: dict[str, Any]) -> None:
            for phrase in dict.fromkeys(_phrase(workspace, name) for name in tags):
                if phrase:
                    chip = gr.Button(f"+ {phrase}", size="sm")
                    chip.click(partial(press, phrase), [form.prompt], [form.prompt])


def _make_images(workspace: Workspace, form: _Form, results: _Results) -> None:
    @showing_errors
    def make(
        prompt: str,
        mode: str,
        training: str | None,
        steps: list[int],
        count: float,
        seed: float | None,
        negative: str,
        num_inference_steps: float,
        guidance: float,
        scheduler: str,
    ) -> Iterator[list[Any]]:
        request = ImageRequest(
            prompt,
            negative_prompt=negative.strip() or None,
            num_inference_steps=int(num_inference_steps),
            guidance_scale=guidance,
            scheduler=scheduler or None,
        )
        variants = chosen_prompts(workspace, prompt, training, steps) if mode == CHECKPOINTS else None
        planned = plan(request, mode, consecutive_seeds(seed, int(count)), variants)
        _remind_of_phrases(workspace, prompt)
        phase = "starting" if workspace.images.is_open else "opening the base"
        yield [_progress(0.0, phase), gr.skip(), gr.skip(), _NOT_CHOSEN, None, gr.skip()]
        run = workspace.images.start(list(planned.requests.values()))
        labels, shown = list(planned.requests), -1
        for _ in run.watch():
            images: list[Any] = [gr.skip(), gr.skip()]
            if len(run.saved) > shown:
                shown, done = len(run.saved), [(str(run.saved[n]), labels[n]) for n in sorted(run.saved)]
                images = [gr.update(value=done, columns=planned.columns), [file for file, _ in done]]
            text = f"{len(run.saved)} of {len(labels)} images"
            yield [_progress(run.progress, text), *images, gr.skip(), run, gr.update(interactive=True)]

    def stop(run: ImageRun | None) -> None:
        if run is not None:
            run.cancel()

    choice = form.checkpoints
    asked = [form.prompt, form.mode, choice.training, choice.steps, *form.sampling]
    shown = [results.progress, results.images, results.files, results.metadata, results.run, form.stop]
    made = form.generate.click(make, asked, shown, concurrency_limit=None, show_progress="hidden")
    made.then(lambda: ["", gr.update(interactive=False)], None, [results.progress, form.stop], show_progress="hidden")
    form.stop.click(stop, [results.run], None, show_progress="hidden")


def _progress(share: float, text: str) -> str:
    return f'<div class="card">{render.bar(share)}<div class="facts">{text}</div></div>'


def _phrase(workspace: Workspace, name: str) -> str:
    try:
        info = workspace.library.info(name)
    except UserError:  # removed meanwhile
        return ""
    return info.trigger_phrase or " ".join(info.trigger_words)


def _remind_of_phrases(workspace: Workspace, prompt: str) -> None:
    text, weights = split_tags(prompt)
    for name in weights:
        words = workspace.library.info(name).trigger_words if name in workspace.library else ()
        if words and not any(has_word(text, word) for word in words):
            gr.Warning(f"The prompt does not have the trigger phrase of {name}: {_phrase(workspace, name)!r}. Add it?")
