"""The page: three tabs on one workspace, and its server."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from atomdiff.ui.config import UiConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log

if TYPE_CHECKING:
    import gradio as gr

    from atomdiff.ui.workspace import Workspace

_CSS_FILE = Path(__file__).with_name("page.css")
_MAX_UPLOAD = "64mb"  # a photo
_CACHE = (3600, 86400)  # seconds between looks at copies of photos and images, and that they are kept


def serve_page(config: UiConfig) -> None:
    """Serve the page until Ctrl-C; a training that runs then goes on, and is found again by the next start.

    Raises:
        UserError: gradio is missing, a folder cannot be used or has another page, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise UserError('atomdiff ui: gradio is missing; pip install "atomdiff[ui]"')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from atomdiff.ui.workspace import open_workspace

    workspace = open_workspace(config)
    with lock_folder(workspace.jobs.folder):
        os.environ.setdefault("GRADIO_TEMP_DIR", str(config.uploads_folder.resolve()))
        workspace.jobs.start()
        try:
            page = build_page(workspace)
            log(f"the page is at {launch(page, workspace)}; Ctrl-C ends its server, not the training")
            page.block_thread()
        finally:
            workspace.jobs.close()
            workspace.images.close()


def build_page(workspace: Workspace) -> gr.Blocks:
    """Build the page, without starting its server.

    Raises:
        UserError: the training config cannot be read.
    """
    import gradio as gr

    from atomdiff.ui.library_tab import library_tab
    from atomdiff.ui.train_tab import train_tab
    from atomdiff.ui.try_tab import try_tab

    with gr.Blocks(title="atomdiff", analytics_enabled=False, fill_width=True, delete_cache=_CACHE) as page:
        base = Path(workspace.config.pretrained_model_name_or_path).name
        gr.HTML(f'<div class="title"><h1>atomdiff</h1><p>Teach {base} your subject, in a small file.</p></div>')
        with gr.Tabs():
            with gr.Tab("Train", id="train"):
                train_tab(workspace, page)
            with gr.Tab("Try", id="try"):
                try_tab(workspace, page)
            with gr.Tab("Library", id="library") as tab:
                library_tab(workspace, page, tab)
    return page


def launch(page: gr.Blocks, workspace: Workspace) -> str:
    """Start the server of a page in a thread, and return its address.

    Raises:
        UserError: the port is taken.
    """
    import gradio as gr
    from gradio.themes.utils.fonts import Font

    config = workspace.config
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="md",
        font=[Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")],
        font_mono=[Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )
    try:
        _, address, _ = page.queue().launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            allowed_paths=[str(Path(folder).resolve()) for folder in (config.output_dir, config.library)],
            max_file_size=_MAX_UPLOAD,
            ssr_mode=False,
            enable_monitoring=False,
            theme=theme,
            css_paths=_CSS_FILE,
        )
    except OSError as error:
        raise UserError(f"port={config.port}: {error}; give another --port, or stop what listens there") from error
    return address
