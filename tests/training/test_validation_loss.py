"""The validation loss of a run: what it is measured on, and that it changes nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from atomdiff.training import dreambooth
from atomdiff.training import run as run_module
from atomdiff.training.dreambooth import train
from tests.helpers import concept_bytes, write_images

EVERYTHING = {
    "aspect_ratio_buckets": "32,32;32,48",
    "masked_loss": False,
    "preservation": "class",
    "train_text_encoder": True,
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
    "gradient_checkpointing": True,
}


def measurements(config):
    """The lines of a run's validation log, without the time they took."""
    lines = [json.loads(line) for line in (Path(config.output_dir) / "validation_log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


@pytest.fixture
def held_out(tmp_path):
    """The folder of two more images."""
    return str(write_images(tmp_path / "more", widths=(32, 48), seed=1))


@pytest.fixture
def config(train_config, held_out):
    """A run of four steps that is measured before the first and after every second."""
    return train_config(
        max_train_steps=4, learning_rate=0.05, validation_loss_steps=2, validation_data_dir=held_out, train_batch_size=3
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "lora", "full"])
@pytest.mark.parametrize(
    "fields", [{}, EVERYTHING, {"use_ema": True}, {"optimizer": "adamw_schedulefree"}], ids=["plain", "all", "ema", "sf"]
)
def test_measuring_does_not_touch_the_training(config, method, fields, adapter_file):
    fields = {**fields, "text_encoder_adapter": "full"} if method == "full" and "train_text_encoder" in fields else fields
    config = dataclasses.replace(config, adapter=adapter_file(method), **fields)
    measured = concept_bytes(train(config))
    lines = measurements(config)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["base_drift"] == pytest.approx(0, abs=1e-10) and lines[1]["base_drift"] > 1e-8
    assert len({line["validation_loss"] for line in lines}) == len({line["training_images_loss"] for line in lines}) == 3
    unmeasured = dataclasses.replace(config, validation_loss_steps=0, validation_data_dir=None)
    assert concept_bytes(train(unmeasured)) == measured
    assert not (Path(config.output_dir) / "validation_log.jsonl").read_text()
