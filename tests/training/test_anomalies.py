"""Loss spikes and values that are not finite are told with the images that they came from."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from atomdiff.training import anomalies, dreambooth
from atomdiff.training.anomalies import LossSpikes
from atomdiff.training.dreambooth import train
from atomdiff.utils.errors import UserError
from tests.helpers import read_log

IMAGES = r"Its images: teapot/\d\.png at timestep \d+, teapot/\d\.png at timestep \d+"


def test_a_spike_is_three_times_the_highest_loss_of_the_last_steps():
    spikes = LossSpikes()
    losses = [0.01, 0.3] * 10
    assert [spikes.ratio(loss) for loss in losses] == [0.0] * 20
    assert spikes.ratio(0.89) == 0 and spikes.ratio(2.7) == pytest.approx(2.7 / 0.89)
    assert [spikes.ratio(0.2) for _ in range(99)] == [0.0] * 99 and spikes.ratio(2.7) == 0
    assert [spikes.ratio(0.2) for _ in range(100)] == [0.0] * 100 and spikes.ratio(0.61) > 3


def test_the_first_steps_are_no_spikes():
    spikes = LossSpikes()
    assert [spikes.ratio(10.0**number) for number in range(20)] == [0.0] * 20 and spikes.ratio(1e21) == 100


@pytest.mark.slow
def test_a_spike_is_warned_of_and_noted_with_its_images(config, monkeypatch):
    monkeypatch.setattr(anomalies, "_FEWEST", 2)
    usual, seen = dreambooth.batch_loss, []

    def spiking(run, number):
        sampled = run.dataset.sample
        monkeypatch.setattr(type(run.dataset), "sample", lambda self, *given: seen.append(sampled(*given)) or seen[-1])
        loss = usual(run, number)
        monkeypatch.undo()
        monkeypatch.setattr(dreambooth, "batch_loss", spiking)
        monkeypatch.setattr(anomalies, "_FEWEST", 2)
        return loss * (100 if number == 2 else 1)

    monkeypatch.setattr(dreambooth, "batch_loss", spiking)
    config = dataclasses.replace(config, logging_steps=2)
    with pytest.warns(UserWarning, match=rf"step 3: the loss is .* times the highest .*{IMAGES}; look at them"):
        train(config)
    lines = read_log(config)
    assert [line["step"] for line in lines if "loss_spikes" in line] == [4]
    (spike,) = lines[1]["loss_spikes"]
    assert spike["step"] == 3 and spike["loss"] > 1
    assert [image.split(" at ")[0] for image in spike["images"]] == seen[2].images
    section = (Path(config.output_dir) / "report.md").read_text().partition("## Numbers that went wrong")[2]
    row = next(line for line in section.splitlines() if line.startswith("| 3 |"))
    assert f"| loss {spike['loss']:.4g} | {', '.join(spike['images'])} |" in row


def test_what_is_not_finite_is_told_with_all_images_of_the_step(config, monkeypatch):
    usual = dreambooth.batch_loss
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: usual(run, number) * float("inf"))
    config = dataclasses.replace(config, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=rf"step 1: the loss is inf; .*{IMAGES}; --detect_anomaly tells where"):
        train(config)
    report = (Path(config.output_dir) / "report.md").read_text()
    assert "**diverged.** Step 1: the loss is inf.\n\nNext: Start again with a learning_rate below 0.005" in report
    assert re.search(r"\| 1 \| the loss is inf \| (teapot/\d\.png at timestep \d+(, )?){2} \|", report)
    assert "the loss is inf" in (Path(config.output_dir) / "report.html").read_text()


@pytest.fixture
def broken_module(monkeypatch):
    """Lets a module of the UNet give what is not finite, forward or backward, from the second step on."""

    def break_module(where):
        usual = dreambooth.batch_loss

        def spoil(module, inputs, output):
            return output * float("nan") if where == "forward" else Broken.apply(output)

        def broken(run, number):
            if number == 1:
                run.model.denoiser.get_submodule("mid_block.resnets.0.norm2").register_forward_hook(spoil, prepend=True)
            return usual(run, number)

        monkeypatch.setattr(dreambooth, "batch_loss", broken)

    return break_module


class Broken(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradients):
        return gradients * float("nan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("forward", r"the output of denoiser\.mid_block\.resnets\.0\.norm2 is not finite"),
        ("backward", r"backward pass: Function 'BrokenBackward' returned nan values"),
    ],
)
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_detect_anomaly_says_where_it_begins(config, broken_module, where, found):
    broken_module(where)
    config = dataclasses.replace(config, detect_anomaly=True)
    with pytest.raises(UserError, match=rf"step 2: {found}.*{IMAGES}$") as caught:
        train(config)
    assert "--detect_anomaly" not in re.sub(r"\s", " ", str(caught.value))
    assert not torch.is_anomaly_enabled()


@pytest.mark.slow
def test_detect_anomaly_changes_nothing(config, tmp_path):
    checked = dataclasses.replace(config, detect_anomaly=True, output_dir=str(tmp_path / "checked"))
    one, other = (json.dumps(read_losses(each)) for each in (config, checked))
    assert one == other


def read_losses(config):
    train(config)
    return [line["loss"] for line in read_log(config)]
