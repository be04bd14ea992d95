"""Rows of the contact sheet in a run."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import contact_sheet, dreambooth, run_log, validation
from atomdiff.training.dreambooth import train
from tests.helpers import concept_bytes


@pytest.mark.slow
def test_the_contact_sheet_has_a_row_every_few_steps(config):
    train(dataclasses.replace(config, validation_steps=3, validation_prompts=("{trigger_word}", "a {class_name}")))
    files = sorted(file.name for file in (Path(config.output_dir) / "validation").iterdir())
    assert files == [f"step-{step:06d}-{column:02d}.png" for step in (0, 3, 4) for column in (0, 1)]
    sheet = Image.open(Path(config.output_dir) / "contact_sheet.png")
    assert sheet.height > 3 * 32


def rows(config):
    """The images of the contact sheet and the sheet."""
    folder = Path(config.output_dir)
    return {file.name: file.read_bytes() for file in [*folder.glob("validation/*"), folder / "contact_sheet.png"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "unwritten", "fields"),
    [
        (2, "contact_sheet.png", {}),
        (2, "step-000002-00.png", {"use_ema": True}),
        (2, "step-000002-01.png", {"optimizer": "adamw_schedulefree"}),
        (4, "contact_sheet.png", {}),
    ],
)
def test_a_row_that_a_stopped_run_lacks_is_generated_when_it_goes_on(
    config, step, unwritten, fields, tmp_path, monkeypatch
):
    prompts = ("{trigger_word}", "a {class_name}")
    fields = {"validation_steps": 2, "validation_prompts": prompts, "checkpointing_steps": 2, **fields}
    config = dataclasses.replace(config, learning_rate=0.05, **fields)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    usual, steps = contact_sheet.write_png, []
    extend = validation.extend_contact_sheet

    def note(folder, step, *rest):
        steps.append(step)
        extend(folder, step, *rest)

    def die(file, image):
        if steps[-1] == step and file.name == unwritten:
            raise RuntimeError("died")
        usual(file, image)

    monkeypatch.setattr(validation, "extend_contact_sheet", note)
    with monkeypatch.context() as patch:
        patch.setattr(contact_sheet, "write_png", die)
        with pytest.raises(RuntimeError, match="died"):
            train(config)
    assert rows(config) != rows(whole)
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest")
    train(resumed)
    assert rows(config) == rows(whole)
    steps.clear()
    train(resumed)
    assert not steps  # nothing is missing


@pytest.mark.slow
def test_a_run_goes_on_with_more_or_fewer_prompts_on_its_sheet(config):
    config = dataclasses.replace(config, checkpointing_steps=2, validation_steps=2)
    expected = concept_bytes(train(config))
    for prompts in (("a {class_name}", "{trigger_word}"), ("a {class_name}",)):
        fields = {"resume_from_checkpoint": "checkpoint-2", "validation_prompts": prompts}
        assert concept_bytes(train(dataclasses.replace(config, **fields))) == expected


@pytest.mark.slow
def test_a_last_row_that_cannot_be_generated_does_not_cost_the_concept(config, monkeypatch):
    config = dataclasses.replace(config, validation_steps=4)
    usual = dreambooth.validate

    def fail(run, step):
        if step == config.max_train_steps:
            raise RuntimeError("out of memory")
        usual(run, step)

    monkeypatch.setattr(dreambooth, "validate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    assert read_concept_file(Path(config.output_dir) / "teapot.atoms.safetensors").training["steps"] == 4


@pytest.mark.slow
def test_a_row_that_cannot_be_written_is_warned_of(config, monkeypatch):
    def fail(file, image):
        raise OSError("no space left")

    monkeypatch.setattr(contact_sheet, "write_png", fail)
    with pytest.warns(UserWarning, match=r"step [04]: the contact sheet cannot be written \(no space left\)"):
        train(dataclasses.replace(config, validation_steps=4))


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_at_a_row_generates_it_later(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, validation_steps=2)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(
            run_log.RunLog, "step", lambda self, step, *_: signal.raise_signal(signal.SIGINT) if step == 2 else None
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert rows(config) == rows(whole)


@pytest.mark.slow
def test_the_contact_sheet_shows_the_average_that_is_saved(config, tmp_path):
    config = dataclasses.replace(config, validation_steps=4, learning_rate=0.05)
    averaged = dataclasses.replace(config, use_ema=True, output_dir=str(tmp_path / "averaged"))
    for run in (config, averaged):
        train(run)
    plain, average = rows(config), rows(averaged)
    assert plain.keys() == average.keys()
    same = {name for name in plain if plain[name] == average[name]}
    assert same == {"step-000000-00.png"}


@pytest.mark.slow
def test_validation_does_not_touch_the_training(config):
    plain = concept_bytes(train(config))
    assert concept_bytes(train(dataclasses.replace(config, validation_steps=1))) == plain


@pytest.mark.slow
def test_too_little_memory_for_validation_costs_only_its_row(config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 3 GiB")

    monkeypatch.setattr(validation, "generate_images", fail)
    with pytest.warns(UserWarning, match="step 4: no row of the contact sheet: CUDA out of memory. Tried to allocate"):
        path = train(dataclasses.replace(config, validation_steps=4))
    assert read_concept_file(path).training["steps"] == 4


@pytest.mark.slow
def test_validation_images_that_are_not_finite_cost_only_their_row(config, broken_base):
    train(dataclasses.replace(config, max_train_steps=2, validation_steps=2))
    broken = dataclasses.replace(config, validation_steps=2, **broken_base)
    with pytest.warns(UserWarning, match="step 2: no row of the contact sheet: .*not finite"):
        path = train(broken)
    assert read_concept_file(path).training["steps"] == 4
    assert not list((Path(config.output_dir) / "validation").glob("*.png"))
