"""The start of the page's server."""

import os
import socket
from dataclasses import replace

import pytest

from atomdiff.cli.main import main
from atomdiff.ui import page
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder


def test_a_missing_gradio_is_named_with_its_extra(ui_config, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'gradio is missing; pip install "atomdiff\[ui\]"'):
        page.serve_page(ui_config)


def test_one_server_has_the_jobs(ui_config, capsys):
    options = ["--output_dir", ui_config.output_dir, "--library", ui_config.library]
    with lock_folder(ui_config.jobs_folder):
        status = main(["ui", "--pretrained_model_name_or_path", ui_config.pretrained_model_name_or_path, *options])
    assert status == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(ui_config, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is put back
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match="give another --port"):
            page.serve_page(replace(ui_config, port=listener.getsockname()[1]))
    assert os.environ["GRADIO_TEMP_DIR"] == str(ui_config.uploads_folder.resolve())
