"""The report of a run: what it holds, and that nothing is lost where it cannot be written."""

import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import dreambooth
from atomdiff.training.dreambooth import train
from atomdiff.training.report import write
from atomdiff.training.report.write import extend_report
from atomdiff.utils.errors import UserError
from tests.helpers import assert_links_lead_somewhere, read_measurements, write_images

FILES = ("training_report.json", "report.md", "report.html", "training_curve.png")


@pytest.fixture
def config(train_config, tmp_path):
    """A run of four steps that is measured after every second, with two more images and a contact sheet."""
    more = str(write_images(tmp_path / "more", widths=(32, 32), seed=1))
    fields = {"validation_loss_steps": 2, "validation_data_dir": more, "validation_steps": 4}
    return train_config(max_train_steps=4, learning_rate=0.05, **fields)


class PageParser(HTMLParser):
    """The open elements, texts and addresses of a page; elements that are not closed are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.slow
def test_a_run_leaves_a_report_that_agrees_with_its_files(config):
    path = train(config)
    folder = Path(config.output_dir)
    record = json.loads((folder / "training_report.json").read_text())
    assert record["concept"] == path.name and record["file_bytes"] == path.stat().st_size
    assert (record["step"], record["max_train_steps"]) == (4, 4)
    assert record["held_out_images"] == ["0.png", "1.png"] and record["image_count"] == 3
    assert record["config"] == json.loads(json.dumps(config.snapshot()))
    assert record["final_loss"] == read_concept_file(path).training["final_loss"]
    assert [line | {"seconds": 0} for line in record["measurements"]] == [
        line | {"seconds": 0} for line in read_measurements(config)
    ]
    assert record["train_seconds"] > 0 and record["seconds_per_step"] == pytest.approx(record["train_seconds"] / 4, 0.5)
    assert record["versions"]["atomdiff"] and str(folder.parent) not in json.dumps(record["config"])
    markdown = (folder / "report.md").read_text()
    for finding in record["findings"]:
        assert f"**{finding['verdict']}.** {finding['evidence']}\n" in markdown
    assert assert_links_lead_somewhere(folder / "report.md") == ["training_curve.png", "contact_sheet.png"]
    assert "\n| learning_rate | 0.05 |\n" in markdown
    assert "\n| snr_gamma" not in markdown  # as by default
    assert len(re.findall(r"^\| [024] \|", markdown, re.MULTILINE)) == 3


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_no_network(config, teapot_images):
    train(dataclasses.replace(config, class_name="<b>&teapot"))
    text = (Path(config.output_dir) / "report.html").read_text()
    page = PageParser(text)
    assert "script" not in page.seen and "link" not in page.seen and page.seen.count("svg") == 1
    assert page.seen.count("img") == 1 and "b" not in page.seen
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "Training of sks <b>&teapot" in page.texts
    assert "color-scheme: light dark" in text and 'name="viewport"' in text


@pytest.mark.slow
def test_a_run_without_measurements_and_images_has_a_report(config):
    fields = {"validation_loss_steps": 0, "validation_data_dir": None, "validation_steps": 0}
    train(config)
    train(dataclasses.replace(config, **fields))
    record = json.loads((Path(config.output_dir) / "training_report.json").read_text())
    assert record["measurements"] == [] and [finding["verdict"] for finding in record["findings"]] == ["unknown"]
    page = PageParser((Path(config.output_dir) / "report.html").read_text())
    assert "img" not in page.seen and "Loss at fixed noise" not in page.texts  # nothing of the run before


@pytest.mark.slow
def test_a_finished_run_that_goes_on_writes_the_same_report(config):
    config = dataclasses.replace(config, checkpointing_steps=4)
    train(config)
    file = Path(config.output_dir) / "training_report.json"
    before = json.loads(file.read_text())
    train(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert json.loads(file.read_text()) == before


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["write_json", "write_text", "stored_bytes", "read_log"])
def test_a_report_that_fails_is_warned_of_and_none_of_an_earlier_run_is_left(config, broken, monkeypatch):
    train(config)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, broken, fail)
    with pytest.warns(UserWarning, match="safetensors is saved, but its report cannot be written: .*No space left"):
        path = train(config)
    assert read_concept_file(path).training["steps"] == 4
    assert not (Path(config.output_dir) / "report.html").exists()


@pytest.mark.slow
def test_a_damaged_log_is_no_obstacle(config, monkeypatch):
    def damaged(file):
        return [{"step": 2, "lr": 0.1}, {"step": 4}]

    monkeypatch.setattr(write, "read_log", damaged)
    with pytest.warns(UserWarning, match="is saved, but its report cannot be written: 'samples_per_second'"):
        assert train(config).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("validation_steps", [0, 2])
def test_a_run_that_ends_with_an_error_shows_what_was_measured(config, monkeypatch, validation_steps):
    usual = dreambooth.batch_loss
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: usual(run, number) * (math.nan if number else 1))
    train(dataclasses.replace(config, max_train_steps=1))  # its files are not those of the next
    config = dataclasses.replace(config, validation_loss_steps=1, validation_steps=validation_steps)
    with pytest.raises(UserError, match="step 2: the loss is nan"):
        train(config)
    folder = Path(config.output_dir)
    sheet = ["contact_sheet.png"] * bool(validation_steps)
    assert assert_links_lead_somewhere(folder / "report.md") == ["training_curve.png", *sheet]
    markdown = (folder / "report.md").read_text()
    first, last = read_measurements(config)
    for line in (first, last):
        assert f"| {line['step']} | {line['validation_loss']:.4g} | {line['training_images_loss']:.4g} |" in markdown
    page = PageParser((folder / "report.html").read_text())
    assert page.seen.count("svg") == 1 and page.seen.count("img") == len(sheet) and "held-out images" in page.texts
    assert not (folder / "training_report.json").exists()


@pytest.mark.slow
def test_metrics_and_images_are_added_later(config):
    train(config)
    folder = Path(config.output_dir)
    metrics, elsewhere = (
        {"drift": 0.25, "similarity": {"base": 0.5, "real": None}},
        folder / "two words" / "a sheet.png",
    )
    elsewhere.parent.mkdir()
    shutil.copy(folder / FILES[-1], elsewhere)
    extend_report(folder, metrics, {"More": elsewhere}, "Of <two> photos.")
    assert assert_links_lead_somewhere(folder / "report.md")[-1] == "two%20words/a%20sheet.png"
    page = PageParser((folder / "report.html").read_text())
    for text in ("drift", "0.25", "similarity, base", "0.5", "similarity, real", "-", "More", "Of <two> photos."):
        assert text in page.texts
    assert page.seen.count("img") == 2
    with pytest.warns(UserWarning, match="report.html cannot be extended: .*nowhere.png"):
        extend_report(folder, {}, {"More": folder / "nowhere.png"})
    (folder / "training_report.json").unlink()
    extend_report(folder, {}, {})
