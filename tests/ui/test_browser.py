"""The page in a browser, from photos to an export; skipped where there is no chromium (tests/install_chromium.sh)."""

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.helpers import write_images

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing; tests/install_chromium.sh installs it"),
]
TIMEOUT = 90_000  # milliseconds; what takes long is the start of the training process


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def workspace(ui_config, monkeypatch):
    """The page on the tiny pipeline, served."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from atomdiff.ui.page import build_page, launch
    from atomdiff.ui.workspace import open_workspace

    workspace = open_workspace(replace(ui_config, port=free_port()))
    workspace.jobs.start()
    page = build_page(workspace)
    launch(page, workspace)
    yield workspace
    page.close()
    workspace.jobs.close()
    for job in workspace.jobs.jobs():
        if job.status in ("running", "stopping"):
            psutil.Process(job.state.process).kill()


@pytest.fixture
def address(workspace):
    return f"http://127.0.0.1:{workspace.config.port}/"


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def test_train_try_and_export(browser, workspace, address, tmp_path):
    photos = sorted(write_images(tmp_path / "photos", widths=(32, 32, 48)).iterdir())
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(address)

    page.locator("#photos input[type=file]").set_input_files(photos)
    page.get_by_text("not square (48x32): trained in square crops").wait_for()
    page.locator("#start").click()
    page.get_by_text("found no class name").wait_for()
    page.get_by_label("Caption (optional)").first.fill("a photo of sks mug on a table")
    page.locator("#class-name").locator("input, textarea").fill("mug")
    page.locator("#start").click()
    page.locator("#status", has_text="sks-mug").wait_for()

    page.reload()  # in the middle: the job does not know of the page
    page.locator("#status", has_text="sks-mug").wait_for()
    page.locator("#status", has_text="finished").wait_for()
    page.locator("#run-images img").nth(2).wait_for()  # of steps 0, 1 and 2
    page.locator("#report", has_text="trigger phrase").wait_for()
    (job,) = workspace.jobs.jobs()
    assert (job.images_folder / "01.txt").read_text() == "a photo of sks mug on a table\n"
    assert job.result.is_file()

    page.get_by_role("tab", name="Try").click()
    page.locator("#concepts input").click()
    page.get_by_role("option", name="sks-mug").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="+ sks mug").click()
    page.get_by_label("Before and after").check()
    page.get_by_label("First seed").fill("7")
    page.locator("#generate").click()
    page.locator("#images img").nth(7).wait_for()
    page.locator("#images button:has(img)").nth(1).click()
    page.locator("#metadata", has_text="a photo of sks mug <atoms:sks-mug:1>").wait_for()

    page.get_by_role("tab", name="Library").click()
    page.locator("#gallery button:has(img)").first.click()
    page.locator("#details", has_text="filter atoms").wait_for()
    page.locator("#export").click()
    page.locator("#exported", has_text="sks-mug-lora").wait_for()
    assert Path(workspace.config.output_dir, "exports", "sks-mug-lora.safetensors").is_file()
    page.locator("#delete").click()
    page.get_by_text("The library is empty").wait_for()
    assert list(workspace.library) == []

    local = (address, "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []
