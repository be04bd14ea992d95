"""The tab *Library*: concept files with their images; look at them, rename, throw away and export them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.report import describe_export
from atomdiff.ui import library, render
from atomdiff.ui.components import heading, showing_errors
from atomdiff.ui.workspace import Workspace

_SHOWN = 120  # concepts at once
_FORMATS = {
    "LoRA, for diffusers, WebUI, ComfyUI": "lora",
    "Exact differences, for WebUI, ComfyUI, InvokeAI": "diff",
    "A whole pipeline, for diffusers": "pipeline",
}
_NOTHING = '<div class="card empty">Choose a concept to see what it is.</div>'


def library_tab(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""
    names, name = gr.State([]), gr.State()
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            query = gr.Textbox(
                "",
                show_label=False,
                container=False,
                placeholder="Search names, trigger words, bases",
                interactive=True,
                elem_id="search",
            )
            gallery = gr.Gallery(
                show_label=False,
                columns=4,
                fit_columns=False,
                height="auto",
                interactive=False,
                allow_preview=False,
                buttons=[],
                object_fit="cover",
                elem_id="gallery",
            )
            found = gr.Markdown(elem_classes="note")
        with gr.Column(scale=5, min_width=320):
            details = gr.HTML(_NOTHING, elem_id="details")
            with gr.Column(visible=False, elem_id="actions") as actions:
                heading("Export", "For other programs, with weight 1.")
                target = gr.Radio(
                    list(_FORMATS), value=next(iter(_FORMATS)), show_label=False, interactive=True, elem_id="format"
                )
                export = gr.Button("Export", variant="primary", elem_id="export")
                exported = gr.File(label="Exported", visible=False, interactive=False, elem_id="exported")
                report = gr.Code(visible=False, show_label=False, interactive=False, language=None, max_lines=10)
                heading("Rename", "The file only; trigger words stay.")
                with gr.Row():
                    new_name = gr.Textbox(
                        "", show_label=False, container=False, scale=3, interactive=True, elem_id="new-name"
                    )
                    rename = gr.Button("Rename", scale=1, min_width=90, elem_id="rename")
                delete = gr.Button("Move to the trash", variant="stop", elem_id="delete")

    listing = [names, gallery, found]
    chosen = [name, details, actions, new_name, exported, report]

    @showing_errors
    def search(text: str) -> list[Any]:
        infos = library.search(workspace.library, text)
        shown = [(library.thumbnail(info), info.name) for info in infos[:_SHOWN]]
        if infos:
            note = f"{len(infos)} concepts" if len(infos) != 1 else "1 concept"
            note += f", of which the newest {_SHOWN} are shown" if len(infos) > _SHOWN else ""
        else:
            note = "No concept matches." if text else "The library is empty. Train a concept, or copy files in."
        if damaged := workspace.library.damaged:
            note += f" {len(damaged)} files cannot be read: {', '.join(path.name for path in damaged)}."
        return [[info.name for info in infos], shown, note]

    def show(name: str | None) -> list[Any]:
        if name is None:
            return [None, _NOTHING, gr.update(visible=False), "", *[gr.update(value=None, visible=False)] * 2]
        rows = library.describe(workspace.library.info(name))
        headline = f'<div class="headline"><b>{escape(name)}</b></div>'
        card = f'<div class="card">{headline}{render.table(rows)}</div>'
        hidden = gr.update(value=None, visible=False)
        return [name, card, gr.update(visible=True), name.rpartition("/")[2], hidden, hidden]

    @showing_errors
    def choose(names: list[str], event: gr.SelectData) -> list[Any]:
        return show(names[event.index])

    @showing_errors
    def export_one(name: str, target: str) -> list[Any]:
        info, form = workspace.library.info(name), _FORMATS[target]
        folder = workspace.config.exports_folder
        output = folder / (f"{name}-pipeline" if form == "pipeline" else f"{name}-{form}.safetensors")
        if form == "pipeline":
            number = 1
            while output.exists():
                number += 1
                output = folder / f"{name}-pipeline-{number}"
        output.parent.mkdir(parents=True, exist_ok=True)
        done = export_concepts(
            ExportConfig(
                **workspace.config.base_options,
                concepts=(str(info.path),),
                to=form,  # type: ignore[arg-type]  # as in the table
                output=str(output),
            )
        )
        files = [] if done.is_folder else [done.path] if done.path.is_file() else []
        files += [] if done.is_folder else [*done.embeddings.values()]
        shown = gr.update(value=[str(file) for file in files] or None, visible=bool(files))
        return [shown, gr.update(value=describe_export(done), visible=True)]

    @showing_errors
    def rename_one(name: str, new_name: str, text: str) -> list[Any]:
        renamed = library.rename(workspace.library, name, new_name)
        gr.Info(f"{name} is {renamed} now.")
        return search(text) + show(renamed)

    @showing_errors
    def delete_one(name: str, text: str) -> list[Any]:
        gr.Info(f"Moved to {library.delete(workspace.library, name)}. Move it back to undo.")
        return search(text) + show(None)

    for event in (query.input, tab.select, page.load):
        event(search, [query], listing, show_progress="hidden")
    gallery.select(choose, [names], chosen)
    export.click(export_one, [name, target], [exported, report])
    rename.click(rename_one, [name, new_name, query], listing + chosen)
    delete.click(delete_one, [name, query], listing + chosen)
