"""The page in a browser, from photos to an export; skipped where there is no chromium (tests/install_chromium.sh)."""

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants
from playwright.sync_api import expect

from atomdiff.ui import recipes
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
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(ui_config.uploads_folder))  # other pages empty the common one
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path(ui_config.output_dir) / "nobody"))  # is logged in
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    from atomdiff.ui.page import build_page, launch
    from atomdiff.ui.workspace import open_workspace

    workspace = open_workspace(replace(ui_config, port=free_port()))
    workspace.jobs.start()
    page = build_page(workspace)
    launch(page, workspace)
    yield workspace
    page.server.force_exit = True  # not page.close(): it sets an asyncio event from this thread, not the server's own
    page.server.close()
    workspace.jobs.close()
    workspace.images.close()
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
    prompt = page.locator("#prompt textarea")
    expect(prompt).to_have_value("a photo of sks mug <atoms:sks-mug:1>")
    page.get_by_text("By block and over the steps: sks-mug").click()
    page.get_by_label("number input for Up blocks").fill("0.5")
    page.get_by_label("number input for Up blocks").press("Enter")
    weighted = 'a photo of sks mug <atoms:sks-mug:{"weight": 1, "blocks": {"up": 0.5}}>'
    expect(prompt).to_have_value(weighted)
    weight = page.get_by_label("number input for sks-mug", exact=True)
    weight.fill("")
    weight.press_sequentially("0.8")
    expect(prompt).to_have_value(weighted.replace("1", "0.8", 1))
    weight.fill("")
    weight.blur()
    expect(prompt).to_have_value(weighted.replace("1", "0", 1))
    expect(weight).to_have_value("0")
    weight.fill("1")
    expect(prompt).to_have_value(weighted)
    page.get_by_label("Before and after").check()
    page.get_by_label("First seed").fill("")
    page.locator("#generate").click()
    page.get_by_text("found no first seed").wait_for()
    assert page.get_by_text("NoneType").count() == 0  # in no message, of the sliders' boxes either
    page.get_by_label("First seed").fill("7")
    page.locator("#generate").click()
    page.locator("#images img").nth(7).wait_for()
    page.locator("#images button:has(img)").nth(1).click()
    page.locator("#metadata", has_text=weighted).wait_for()
    page.keyboard.press("Escape")

    page.get_by_label("Checkpoints").check()
    page.locator("#compared-steps").get_by_label("1").wait_for()
    page.locator("#generate").click()
    page.locator("#images", has_text="seed 7, step 1").wait_for()
    page.locator("#images", has_text="seed 10, step 2").wait_for()

    page.get_by_role("tab", name="Library").click()
    page.locator("#gallery button:has(img)").first.click()
    page.locator("#details", has_text="filter atoms").wait_for()
    page.locator("#export").click()
    page.locator("#exported", has_text="sks-mug-lora").wait_for()
    assert Path(workspace.config.output_dir, "exports", "sks-mug-lora.safetensors").is_file()
    page.get_by_text("Push to the Hub").click()
    page.locator("#push-now").click()
    page.get_by_text("hf auth login").last.wait_for()
    page.locator("#delete").click()
    page.get_by_text("The library is empty").wait_for()
    assert list(workspace.library) == []

    local = (address, "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []


def test_ask_for_images_and_a_concept_and_stop(browser, workspace, address, tmp_path):
    photos = sorted(write_images(tmp_path / "photos", widths=(32, 32)).iterdir())
    options = recipes.combine_options("mug", "sks", "tiny", recipes.starting_options(workspace.config), 2)
    steps = {"max_train_steps": 3000, "validation_steps": 3000, "save_steps": 0, "validation_loss_steps": 0}
    job = workspace.jobs.add("mug", [(file, "") for file in photos], {**options, **steps}, recipes.check_config)
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.locator("#generate-now:enabled").click()
    page.get_by_text("Images follow after the next step").wait_for()
    page.locator("#save-now").click()
    page.locator("#run-images img").nth(1).wait_for()  # beside that of step 0
    page.locator("#stop").click()
    page.locator("#status", has_text="stopped").wait_for()
    assert len(job.saved_steps) == 1

    page.get_by_role("tab", name="Try").click()
    page.locator("#prompt textarea").fill("a mug")
    page.get_by_text("More", exact=True).click()
    page.locator("#sampling-steps input[type=number]").fill("100")
    page.locator("#count input[type=number]").fill("16")
    page.locator("#generate").click()
    page.locator("#stop-images:enabled").click()
    page.locator("#stop-images:disabled").wait_for()
    assert workspace.images._engine.stats.cancelled


def test_photos_are_judged_again_after_advanced_was_edited_and_keep_their_captions(browser, address, tmp_path):
    photos = sorted(write_images(tmp_path / "photos", widths=(32, 36)).iterdir())
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.locator("#photos input[type=file]").set_input_files(photos[:1])
    captions = page.get_by_label("Caption (optional)")
    captions.first.fill("a photo of sks mug")
    page.locator("#photos input[type=file]").set_input_files(photos[1:])
    expect(captions).to_have_count(2)
    page.get_by_text("Advanced: all options as YAML").click()
    options = page.locator("#advanced .cm-content")
    for side, note in ((128, "cannot be used: 32 pixels"), (64, "small: enlarged to 64 pixels")):
        options.click()
        page.keyboard.press("Control+End")
        page.keyboard.type(f"\nresolution: {side}")
        page.locator("#class-name").locator("input, textarea").click()
        page.get_by_text(note).first.wait_for()
        options.click()
        page.keyboard.press("Control+End")
        page.keyboard.press("Shift+Home")
        page.keyboard.press("Delete")
    page.get_by_role("button", name="Remove").last.click()
    expect(captions).to_have_count(1)
    expect(captions).to_have_value("a photo of sks mug")
