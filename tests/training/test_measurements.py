"""The log of measurements, across stops too, and the parameters with the lowest validation loss."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import measurements
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.validation_loss import FixedSamples
from atomdiff.utils.errors import UserError
from tests.helpers import concept_bytes, read_measurements, stop_at, write_images


@pytest.fixture
def config(train_config, tmp_path):
    """A run of six steps that is measured after each of them, with two more images."""
    more = str(write_images(tmp_path / "more", widths=(32, 32), seed=1))
    fields = {"validation_loss_steps": 1, "validation_data_dir": more, "checkpointing_steps": 2}
    return train_config(max_train_steps=6, learning_rate=0.05, **fields)


@pytest.fixture
def losses(monkeypatch):
    """Makes the validation loss after each step what it says, by its place in the list."""

    def pretend(values):
        usual, count = FixedSamples.measure, iter(values)

        def measure(self, *rest):
            found, drift = usual(self, *rest)
            return found | {"validation_loss": next(count)}, drift

        monkeypatch.setattr(FixedSamples, "measure", measure)

    return pretend


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stopped", "fields"),
    [(2, {}), (3, {"use_ema": True, "ema_decay": 0.5, "keep_best": True}), (3, {"adapter": "full"})],
    ids=["plain", "best", "full"],
)
def test_a_resumed_run_has_the_measurements_of_one_without_a_stop(config, stopped, fields, tmp_path, monkeypatch):
    config = dataclasses.replace(config, **fields)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    expected = concept_bytes(train(whole))
    with monkeypatch.context() as patch:
        stop_at(patch, stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    log = Path(config.output_dir) / "validation_log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 5, "validation_loss": 0.0}) + "\n")  # of a run that was killed
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest")
    assert concept_bytes(train(resumed)) == expected
    assert read_measurements(resumed) == read_measurements(whole)
    assert [line["step"] for line in read_measurements(whole)] == [*range(7)]


@pytest.mark.slow
def test_a_measurement_that_the_stopped_run_lacks_is_made(config):
    train(dataclasses.replace(config, validation_loss_steps=0, validation_data_dir=None))
    resumed = dataclasses.replace(config, resume_from_checkpoint="checkpoint-4", validation_loss_steps=2)
    train(resumed)
    assert [line["step"] for line in read_measurements(resumed)] == [4, 6]


@pytest.mark.slow
def test_a_new_run_starts_a_new_log(config):
    train(config)
    shorter = dataclasses.replace(config, max_train_steps=2)
    train(shorter)
    assert [line["step"] for line in read_measurements(shorter)] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_ema": True}], ids=["last", "averaged"])
def test_the_best_is_what_a_run_of_so_many_steps_saves(config, fields, losses, tmp_path, capsys):
    short = dataclasses.replace(config, max_train_steps=4, output_dir=str(tmp_path / "short"), **fields)
    expected = read_concept_file(train(short))
    losses([0.1, 0.9, 0.5, 0.4, 0.2, 0.2, 0.3])  # the base does not count
    best = read_concept_file(train(dataclasses.replace(config, keep_best=True, **fields)))
    for found, wanted in zip(flat(best), flat(expected), strict=True):
        assert found.equal(wanted)
    assert best.training["steps"] == 4 and best.training["config"]["max_train_steps"] == 6
    report = json.loads((Path(config.output_dir) / "training_report.json").read_text())
    assert (report["step"], report["max_train_steps"]) == (4, 6)
    assert "saving the parameters of step 4, with the lowest validation loss (0.2000)\n" in capsys.readouterr().err


def flat(concept):
    """All tensors of a concept."""
    layers = [tensor for _, layer in sorted(concept.layers.items()) for _, tensor in sorted(layer.items())]
    return [*layers, *concept.tokens["sks"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_warned_of_and_never_best(config, value, losses):
    losses([0.5, value, 0.4, value])
    config = dataclasses.replace(config, max_train_steps=3, keep_best=True)
    with pytest.warns(UserWarning, match=f"step [13]: the validation_loss is {value}; not noted"):
        assert read_concept_file(train(config)).training["steps"] == 2
    assert [line["step"] for line in read_measurements(config)] == [0, 2]


@pytest.mark.slow
def test_parameters_that_were_not_kept_are_no_longer_the_best(config, losses):
    losses([0.5, 0.3, 0.4, 0.45])
    config = dataclasses.replace(config, max_train_steps=2, checkpointing_steps=2)
    train(config)
    again = dataclasses.replace(config, max_train_steps=3, resume_from_checkpoint="latest", keep_best=True)
    with pytest.raises(
        UserError, match="checkpoint-2: written without keep_best, so it lacks the parameters of step 1"
    ):
        train(again)
    train(dataclasses.replace(again, keep_best=False))


@pytest.mark.slow
def test_what_cannot_be_measured_or_noted_costs_nothing_else(config, monkeypatch):
    config = dataclasses.replace(config, max_train_steps=2)
    expected = concept_bytes(train(config))
    with monkeypatch.context() as patch:

        def fail(self, *rest):
            raise RuntimeError("out of memory")

        patch.setattr(FixedSamples, "measure", fail)
        with pytest.warns(UserWarning, match="step 2: the validation loss cannot be measured: out of memory"):
            assert concept_bytes(train(config)) == expected

    def full(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measurements, "append_line", full)
    with pytest.warns(UserWarning, match=r"validation_log.jsonl: cannot be written \(No space"):
        assert concept_bytes(train(config)) == expected
    report = json.loads((Path(config.output_dir) / "training_report.json").read_text())
    assert [line["step"] for line in report["measurements"]] == [0, 1, 2]


@pytest.mark.slow
def test_trackers_get_the_losses(config):
    train(dataclasses.replace(config, report_to="tensorboard", max_train_steps=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "logs" / "atomdiff"))
    events.Reload()
    for name in ("validation_loss", "training_images_loss", "base_drift"):
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("steps", "batch_size", "interval"), [(400, 4, 100), (300, 8, 50), (1000, 4, 125), (10_000, 1, 1250), (4, 2, 2)]
)
def test_a_run_is_measured_two_to_eight_times(steps, batch_size, interval):
    config = TrainConfig(
        pretrained_model_name_or_path="base",
        instance_data_dir="photos",
        class_name="mug",
        max_train_steps=steps,
        train_batch_size=batch_size,
    )
    assert config.validation_loss_interval == interval
    measured = [step for step in range(steps + 1) if measurements.is_measured(config, step)]
    assert measured[0] == 0 and measured[-1] == steps and measured[1] == interval
