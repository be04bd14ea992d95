"""The tab *Try*: prompts with concepts, beside each other with the same seed, over seeds or over weights."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from atomdiff.pipelines.prompt_syntax import has_word, split_tags
from atomdiff.sampling.config import SampleConfig
from atomdiff.ui import render
from atomdiff.ui.components import heading, showing_errors
from atomdiff.ui.images import ImageRequest
from atomdiff.ui.recipes import starting_sampling
from atomdiff.ui.workspace import Workspace
from atomdiff.utils.errors import UserError

_SEEDS, _BEFORE_AFTER, _WEIGHTS = "Several seeds", "Before and after", "Several weights"
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the weights that are set
_MAX_IMAGES = 16
_NOT_CHOSEN = '<div class="empty">Press an image.</div>'


def try_tab(workspace: Workspace, page: gr.Blocks) -> None:
    """Build the tab."""
    usual = starting_sampling(workspace.config)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            heading("Concepts", "From the library; several may act together.")
            concepts = gr.Dropdown(
                [], multiselect=True, show_label=False, container=False, interactive=True, elem_id="concepts"
            )
            sliders = gr.Column()
            heading("Prompt", "Press a trigger phrase to add it; a concept shows where its phrase stands.")
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
            mode = gr.Radio(
                [_SEEDS, _BEFORE_AFTER, _WEIGHTS], value=_SEEDS, label="Compare", interactive=True, elem_id="mode"
            )
            with gr.Row():
                count = gr.Slider(1, _MAX_IMAGES, value=4, step=1, label="Seeds", interactive=True)
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
                    guidance = gr.Slider(
                        1, 20, value=usual["guidance_scale"], step=0.5, label="Guidance", interactive=True
                    )
                gr.Markdown(
                    "Weights by block and over the steps go into the prompt, as in "
                    '`<atoms:NAME:{"blocks": {"down": 0.5}, "steps": {"0": 1, "1": 0.2}}>`.',
                    elem_classes="note",
                )
            generate = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
        with gr.Column(scale=6, min_width=320):
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

    files = gr.State([])  # of the images; paths are never taken from the browser
    weights = gr.State({})  # of concepts whose slider was moved

    with sliders:

        @gr.render(inputs=[concepts, weights], triggers=[concepts.change])
        def show_sliders(names: list[str], weights_now: dict[str, float]) -> None:
            for name in names:
                value = weights_now.get(name, 1.0)
                slider = gr.Slider(0, 1.5, value, step=0.05, label=name, key=f"weight-{name}", interactive=True)
                slider.change(partial(_set_weight, name), [slider, weights], [weights], show_progress="hidden")

    @showing_errors
    def make(
        names: list[str],
        weights: dict[str, float],
        prompt: str,
        mode: str,
        count: float,
        seed: float,
        negative: str,
        steps: float,
        guidance: float,
    ) -> Iterator[Any]:
        chosen = {name: weights.get(name, 1.0) for name in names}
        requests = plan(prompt, chosen, mode, range(int(seed), int(seed) + int(count)))
        config = SampleConfig(
            **workspace.config.base_options,
            dtype=workspace.config.dtype,
            output_dir=str(workspace.config.images_folder / time.strftime("%Y-%m-%d_%H%M%S")),
            negative_prompt=negative.strip() or None,
            num_inference_steps=int(steps),
            guidance_scale=guidance,
        )
        _remind_of_phrases(workspace, prompt, chosen)
        made: dict[str, Path] = {}
        labels = {request: label for label, request in requests.items()}
        for request, path in workspace.images.make(list(requests.values()), config):
            made[labels[request]] = path
            done = [(str(made[label]), label) for label in requests if label in made]
            shown = gr.update(value=done, columns=2 if mode == _BEFORE_AFTER else 3)
            yield shown, [file for file, _ in done], _NOT_CHOSEN

    asked = [concepts, weights, prompt, mode, count, seed, negative, steps, guidance]
    generate.click(make, asked, [images, files, metadata])

    with chips:

        @gr.render(inputs=[concepts])
        def show_chips(names: list[str]) -> None:
            for phrase in dict.fromkeys(_phrase(workspace, name) for name in names):
                if phrase:
                    chip = gr.Button(f"+ {phrase}", size="sm")
                    chip.click(partial(_add_phrase, phrase), [prompt], [prompt])

    def describe(made: list[str], event: gr.SelectData) -> str:
        with Image.open(made[event.index]) as image:
            return render.table(
                {str(key): value for key, value in image.info.items() if isinstance(value, str) and value}
            )

    def refresh() -> Any:  # of the choices alone: what is chosen may change meanwhile
        workspace.library.refresh()
        return gr.update(choices=list(workspace.library))

    images.select(describe, [files], [metadata])
    concepts.focus(refresh, None, [concepts], show_progress="hidden")
    page.load(refresh, None, [concepts], show_progress="hidden")


def plan(prompt: str, weights: Mapping[str, float], mode: str, seeds: Sequence[int]) -> dict[str, ImageRequest]:
    """Return the images of a click, by their labels.

    Args:
        prompt: as written, perhaps with tags.
        weights: concept -> weight.
        mode: what is compared.
        seeds: of the images; for comparisons each has a pair, or a row.

    Raises:
        UserError: the prompt is empty or names concepts twice, or there is no concept to compare.
    """
    if not split_tags(prompt)[0].strip():
        raise UserError("found no prompt; write what the image should show")
    if twice := [name for name in split_tags(prompt)[1] if name in weights]:
        raise UserError(f"{twice[0]!r} is both chosen and in a tag of the prompt; remove one")
    if mode == _SEEDS:
        return {f"seed {seed}": ImageRequest(_tagged(prompt, weights), seed) for seed in seeds}
    if not weights:
        raise UserError("found no concept to compare; choose one above, or compare several seeds")
    if mode == _BEFORE_AFTER:
        pairs = {}
        for seed in seeds:
            pairs[f"seed {seed}, base"] = ImageRequest(prompt, seed)
            pairs[f"seed {seed}, concepts"] = ImageRequest(_tagged(prompt, weights), seed)
        return pairs
    return {
        f"seed {seed}, weight x {share:g}": ImageRequest(
            _tagged(prompt, {name: share * weight for name, weight in weights.items()}), seed
        )
        for seed in seeds
        for share in _SHARES
    }


def _set_weight(name: str, value: float, weights: dict[str, float]) -> dict[str, float]:
    return {**weights, name: value}


def _tagged(prompt: str, weights: Mapping[str, float]) -> str:
    return " ".join([prompt.strip(), *(f"<atoms:{name}:{weight:g}>" for name, weight in weights.items())])


def _phrase(workspace: Workspace, name: str) -> str:
    try:
        info = workspace.library.info(name)
    except UserError:  # removed meanwhile
        return ""
    return info.trigger_phrase or " ".join(info.trigger_words)


def _add_phrase(phrase: str, prompt: str) -> str:
    if has_word(prompt, phrase):
        return prompt
    return re.sub(r"\s+", " ", f"{prompt.rstrip()} {phrase}").strip() if prompt.strip() else f"a photo of {phrase}"


def _remind_of_phrases(workspace: Workspace, prompt: str, weights: Mapping[str, float]) -> None:
    for name in weights:
        words = workspace.library.info(name).trigger_words
        if words and not any(has_word(prompt, word) for word in words):
            gr.Warning(f"The prompt does not have the trigger phrase of {name}: {_phrase(workspace, name)!r}. Add it?")
