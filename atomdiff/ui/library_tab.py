"""The tab *Library*: concept files with their images; look at them, rename, throw away, export and share them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
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


@dataclass(frozen=True)
class _Listing:
    """The concepts that are found."""

    names: gr.State
    gallery: gr.Gallery
    found: gr.Markdown

    @property
    def components(self) -> list[Any]:
        """All, in the order of `_search`."""
        return list(vars(self).values())


@dataclass(frozen=True)
class _Chosen:
    """The concept that is chosen."""

    name: gr.State
    details: gr.HTML
    actions: gr.Column
    new_name: gr.Textbox
    exported: gr.File
    report: gr.Code
    pushed: gr.Markdown

    @property
    def components(self) -> list[Any]:
        """All, in the order of `_show`."""
        return list(vars(self).values())


def library_tab(workspace: Workspace, page: gr.Blocks, tab: gr.Tab) -> None:
    """Build the tab."""

    @showing_errors
    def search(text: str) -> list[Any]:
        return _search(workspace, text)

    @showing_errors
    def choose(names: list[str], event: gr.SelectData) -> list[Any]:
        return _show(workspace, names[event.index])

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
            listing = _build_listing()
        with gr.Column(scale=5, min_width=320):
            chosen = _build_chosen(workspace, query, listing)
    for event in (query.input, tab.select, page.load):
        event(search, [query], listing.components, show_progress="hidden")
    listing.gallery.select(choose, [listing.names], chosen.components)


def _build_listing() -> _Listing:
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
    return _Listing(gr.State([]), gallery, gr.Markdown(elem_classes="note"))


def _build_chosen(workspace: Workspace, query: gr.Textbox, listing: _Listing) -> _Chosen:
    """Build what is shown of a concept, and what can be done with it."""
    name, details = gr.State(), gr.HTML(_NOTHING, elem_id="details")
    with gr.Column(visible=False, elem_id="actions") as actions:
        exported, report = _build_export(workspace, name)
        pushed = _build_push(workspace, name)
        heading("Rename", "The file only; trigger words stay.")
        with gr.Row():
            new_name = gr.Textbox("", show_label=False, container=False, scale=3, interactive=True, elem_id="new-name")
            rename = gr.Button("Rename", scale=1, min_width=90, elem_id="rename")
        delete = gr.Button("Move to the trash", variant="stop", elem_id="delete")
    chosen = _Chosen(name, details, actions, new_name, exported, report, pushed)

    @showing_errors
    def rename_one(name: str, new_name: str, text: str) -> list[Any]:
        renamed = library.rename(workspace.library, name, new_name)
        gr.Info(f"{name} is {renamed} now.")
        return _search(workspace, text) + _show(workspace, renamed)

    @showing_errors
    def delete_one(name: str, text: str) -> list[Any]:
        gr.Info(f"Moved to {library.delete(workspace.library, name)}. Move it back to undo.")
        return _search(workspace, text) + _show(workspace, None)

    changed = listing.components + chosen.components
    rename.click(rename_one, [name, new_name, query], changed)
    delete.click(delete_one, [name, query], changed)
    return chosen


def _build_export(workspace: Workspace, name: gr.State) -> tuple[gr.File, gr.Code]:
    heading("Export", "For other programs, with weight 1.")
    target = gr.Radio(list(_FORMATS), value=next(iter(_FORMATS)), show_label=False, interactive=True, elem_id="format")
    export = gr.Button("Export", variant="primary", elem_id="export")
    exported = gr.File(label="Exported", visible=False, interactive=False, elem_id="exported")
    report = gr.Code(visible=False, show_label=False, interactive=False, language=None, max_lines=10)

    @showing_errors
    def export_one(name: str, target: str) -> list[Any]:
        info, form = workspace.library.info(name), _FORMATS[target]
        output = _free_output(workspace.config.exports_folder, name, form)
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

    export.click(export_one, [name, target], [exported, report])
    return exported, report


def _free_output(folder: Path, name: str, form: str) -> Path:
    """Return where a concept is exported to: files are written again, pipelines get a number."""
    if form != "pipeline":
        return folder / f"{name}-{form}.safetensors"
    number, output = 1, folder / f"{name}-pipeline"
    while output.exists():
        number += 1
        output = folder / f"{name}-pipeline-{number}"
    return output


def _build_push(workspace: Workspace, name: gr.State) -> gr.Markdown:
    with gr.Accordion("Push to the Hub", open=False, elem_id="push"):
        gr.Markdown(
            "Uploads the concept, its thumbnail and a model card. Without a token here, that of `hf auth login` or "
            "`HF_TOKEN` is used. The token is kept nowhere.",
            elem_classes="note",
        )
        with gr.Row():
            repo_id = gr.Textbox("", label="Repository", placeholder="user/name", interactive=True, elem_id="repo-id")
            license = gr.Textbox("", label="License", placeholder="none, or cc-by-4.0 ...", interactive=True)
        token = gr.Textbox("", label="Token", type="password", interactive=True, elem_id="hub-token")
        private = gr.Checkbox(True, label="Private", interactive=True, elem_id="hub-private")
        push = gr.Button("Push", elem_id="push-now")
        pushed = gr.Markdown(elem_id="pushed")

    @showing_errors
    def push_one(name: str, repo_id: str, license: str, token: str, private: bool) -> list[str]:
        url = library.push(workspace.library, name, repo_id, token=token, license=license, private=private)
        return [f"Pushed to [{url}]({url})", ""]

    push.click(push_one, [name, repo_id, license, token, private], [pushed, token])
    return pushed


def _search(workspace: Workspace, text: str) -> list[Any]:
    """Return what the left side shows of the concepts that match."""
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


def _show(workspace: Workspace, name: str | None) -> list[Any]:
    """Return what the right side shows of a concept."""
    hidden = gr.update(value=None, visible=False)
    if name is None:
        return [None, _NOTHING, gr.update(visible=False), "", hidden, hidden, ""]
    rows = library.describe(workspace.library.info(name))
    headline = f'<div class="headline"><b>{escape(name)}</b></div>'
    card = f'<div class="card">{headline}{render.table(rows)}</div>'
    return [name, card, gr.update(visible=True), name.rpartition("/")[2], hidden, hidden, ""]
