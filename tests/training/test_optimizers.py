import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from atomdiff.training import dreambooth
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.config.optimizer import OPTIMIZERS, OptimizerSpec
from atomdiff.training.dreambooth import train
from atomdiff.training.model import build_training_model
from atomdiff.training.optimizers import build_optimizer
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import NeedsPackage

CONFIG = TrainConfig(
    pretrained_model_name_or_path="base",
    instance_data_dir="photos",
    class_name="mug",
    learning_rate=0.1,
    token_learning_rate=0.2,
    max_train_steps=10,
)


@pytest.fixture
def concept(tiny_pipe):
    return build_training_model(CONFIG, tiny_pipe, AtomConfig(), ("a photo of sks mug",))


def test_the_token_has_its_own_learning_rate_and_no_decay(concept):
    adapter, token = build_optimizer(CONFIG, concept.parameter_groups())[0].param_groups
    assert (adapter["initial_lr"], adapter["weight_decay"]) == (0.1, CONFIG.adam_weight_decay)
    assert (token["initial_lr"], token["weight_decay"]) == (0.2, 0)
    assert len(token["params"]) == 1 and token["params"][0] is concept.token_embeddings["text_encoder"]
    assert len(adapter["params"]) == len(concept.trained_parameters()) - 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 1, 1]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, [0, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 0.5, 0]),
        ({"lr_scheduler": "cosine"}, [1, 0.5, 0]),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1, 1, 0]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1, 0.25, 0]),
    ],
)
def test_the_schedules_of_the_learning_rates(concept, fields, expected):
    factor = build_optimizer(dataclasses.replace(CONFIG, **fields), concept.parameter_groups())[1]
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx(expected, abs=1e-5)


def test_scaled_rates_are_multiplied_by_the_images_of_a_step(concept):
    config = dataclasses.replace(CONFIG, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=4)
    optimizer, _ = build_optimizer(config, concept.parameter_groups(), config.learning_rate_scale(2))
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * 24, 0.2 * 24])


def test_default_rates():
    bare = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "class_name": "mug"}
    usual, prodigy = TrainConfig(**bare), TrainConfig(**bare, optimizer="prodigy")
    assert usual.learning_rates == {"adapter": 5e-3, "text_encoder": 5e-3, "token": 1e-2}
    assert set(prodigy.learning_rates.values()) == {1.0}
    assert (prodigy.snapshot()["learning_rate"], prodigy.snapshot()["token_learning_rate"]) == (1.0, 1.0)


PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "token_learning_rate": 1.0}
SCHEDULE_FREE = {"optimizer": "adamw_schedulefree"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd': expected one of adamw, prodigy, adamw_schedulefree"),
        ({**PRODIGY, "use_8bit_adam": True}, "optimizer='prodigy': has no 8-bit state"),
        ({**SCHEDULE_FREE, "use_8bit_adam": True}, "optimizer='adamw_schedulefree': has no 8-bit state"),
        ({**PRODIGY, "learning_rate": 0.005}, "found the learning rates adapter 0.005, .*token 1; expected 1 for all"),
        ({**PRODIGY, "learning_rate": 0.005, "token_learning_rate": 0.005}, "found the learning rates adapter 0.005"),
        ({**PRODIGY, "scale_lr": True}, "expected scale_lr=False"),
        ({**PRODIGY, "adam_epsilon": 0.0}, "adam_epsilon=0.0: expected a number above 0"),
        ({**SCHEDULE_FREE, "lr_scheduler": "cosine"}, "lr_scheduler='cosine': expected constant or constant_with"),
        ({**SCHEDULE_FREE, "use_ema": True}, "expected use_ema=False"),
        ({**SCHEDULE_FREE, "adam_beta1": 0.0}, "adam_beta1=0.0: expected a number above 0"),
        ({"prodigy_d_coef": -1.0}, "prodigy_d_coef=-1.0: expected a number of at least 1e-09"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: expected a number of at least 0 and below 1"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_prodigy_takes_a_rate_of_zero_for_what_stays_still():
    dataclasses.replace(CONFIG, **{**PRODIGY, "learning_rate": 0.0})
    dataclasses.replace(CONFIG, **{**PRODIGY, "learning_rate": 2.0}, train_token=False)


def targets(step):
    """Of the two parameters, for the gradient 2 * (parameter - target)."""
    random = np.random.default_rng(step)
    return random.normal(1, 0.1, 5), random.normal(-2, 0.1, 3)


def moved(fields, steps, rates=None):
    """The two groups of parameters after steps by what `build_optimizer` builds, from the gradients of a quadratic."""
    parameters = [torch.nn.Parameter(start.double()) for start in (torch.full((5,), 0.5), torch.zeros(3))]
    groups = {"adapter": [parameters[0]], "token": [parameters[1]]}
    config = dataclasses.replace(CONFIG, **fields)
    optimizer, factor = build_optimizer(config, groups)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(step)
        for parameter, target in zip(parameters, targets(step), strict=True):
            parameter.grad = 2 * (parameter.detach() - torch.tensor(target))
        optimizer.step()
    if fields["optimizer"] == "adamw_schedulefree":
        optimizer.eval()
    return [parameter.detach().numpy() for parameter in parameters]


def test_schedule_free_as_in_its_paper():
    """Defazio et al., arXiv 2405.15682, algorithm 1."""
    warmup, beta1, beta2, epsilon = 4, 0.8, 0.99, 1e-6
    fields = {**SCHEDULE_FREE, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": warmup, "adam_beta1": beta1}
    fields |= {"adam_beta2": beta2, "adam_epsilon": epsilon, "adam_weight_decay": 0.1}
    found = moved(fields, 10)
    for number, (start, rate, decay) in enumerate([(np.full(5, 0.5), 0.1, 0.1), (np.zeros(3), 0.2, 0.0)]):
        x, z, v, weights = start, start, np.zeros_like(start), 0.0
        for step in range(10):
            y = (1 - beta1) * z + beta1 * x
            gradient = 2 * (y - targets(step)[number])
            v = beta2 * v + (1 - beta2) * gradient**2
            length = rate * min(1, step / warmup)
            z = z - length * (gradient / (np.sqrt(v / (1 - beta2 ** (step + 1))) + epsilon) + decay * y)
            weights += length**2
            share = length**2 / weights if weights else 0.0
            x = (1 - share) * x + share * z
        np.testing.assert_allclose(found[number], x, atol=1e-5)


def test_prodigy_as_in_its_paper():
    """Mishchenko, Defazio, arXiv 2306.06101, algorithm 4, with Adam's bias correction on the step."""
    beta1, beta2, epsilon, coefficient, decay = 0.8, 0.99, 1e-8, 2.0, 0.1
    fields = {**PRODIGY, "prodigy_d_coef": coefficient, "adam_beta1": beta1, "adam_beta2": beta2}
    found = moved({**fields, "adam_epsilon": epsilon, "adam_weight_decay": decay}, 30)
    decays = np.array([decay] * 5 + [0.0] * 3)
    x = start = np.array([0.5] * 5 + [0.0] * 3)
    m = v = s = np.zeros(8)
    d, r, beta3 = 1e-6, 0.0, beta2**0.5
    for step in range(30):
        gradient = 2 * (x - np.concatenate(targets(step)))
        length = d * np.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        m = beta1 * m + (1 - beta1) * d * gradient
        v = beta2 * v + (1 - beta2) * (d * gradient) ** 2
        r = beta3 * r + (1 - beta3) * d * length * (gradient @ (start - x))
        s = beta3 * s + (1 - beta3) * d * d * gradient
        d = max(d, coefficient * r / np.abs(s).sum())
        x = x - length * (m / (np.sqrt(v) + d * epsilon) + decays * x)
    assert d > 1e-3
    np.testing.assert_allclose(np.concatenate(found), x, atol=1e-5)


@pytest.fixture
def run(train_config):
    """The config of a short run on three images."""
    return train_config(train_batch_size=1, max_train_steps=4)


KINDS = {
    "prodigy": {"optimizer": "prodigy", "lr_scheduler": "cosine"},
    "schedule-free": {**SCHEDULE_FREE, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
    "8 bit": {"use_8bit_adam": True, "adapter": "full", "learning_rate": 1e-4},
    "average": {"use_ema": True},
}


def written(config):
    """The bytes of the trained parameters in each file of what a run wrote."""
    path = train(config)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return [file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little") :] for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bytes_and_validation_changes_nothing(run, kind, tmp_path):
    if kind == "8 bit":
        pytest.importorskip("bitsandbytes")
    run = dataclasses.replace(run, **KINDS[kind])
    whole = dataclasses.replace(run, output_dir=str(tmp_path / "whole"), checkpointing_steps=2)
    expected = written(whole)
    resumed = dataclasses.replace(run, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert written(dataclasses.replace(resumed, validation_steps=1)) == expected
    plain = {name: getattr(CONFIG, name) for name in ("optimizer", "lr_scheduler", "use_8bit_adam", "use_ema")}
    assert written(dataclasses.replace(whole, **plain)) != expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prodigy", "schedule-free"])
def test_the_loss_of_one_batch_goes_down(run, kind, monkeypatch):
    usual = dreambooth.batch_loss
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: usual(run, 0))
    train(dataclasses.replace(run, **{**KINDS[kind], "lr_scheduler": "constant"}, max_train_steps=30))
    log = [json.loads(line) for line in (Path(run.output_dir) / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 5e-4
    if kind == "prodigy":  # the line shows the step size that it has estimated
        assert 0 < 3 * log[0]["lr"] < log[-1]["lr"]


def build_sgd(config, groups, settings):
    return torch.optim.SGD(groups, lr=settings["lr"])


def refuse_averages(config):
    if config.use_ema:
        raise UserError(f"optimizer={config.optimizer!r}: does not go with use_ema")


@pytest.mark.slow
def test_an_entry_of_the_table_is_all_that_an_optimizer_takes(run, monkeypatch, capsys):
    spec = OptimizerSpec(
        "plain gradient descent",
        build_sgd,
        needs=NeedsPackage("no_such_package", "plain"),
        learning_rate=0.5,
        token_learning_rate=None,
        check=refuse_averages,
    )
    monkeypatch.setitem(OPTIMIZERS, "sgd", spec)
    with pytest.raises(SystemExit):
        load_config(["--help"])
    assert "sgd: plain gradient descent" in " ".join(capsys.readouterr().out.split())
    command = "--pretrained_model_name_or_path base --instance_data_dir photos --class_name mug --optimizer sgd"
    assert load_config(command.split()).learning_rates == {"adapter": 0.5, "text_encoder": 0.5, "token": 0.5}
    run = dataclasses.replace(run, optimizer="sgd", max_train_steps=2)
    with pytest.raises(UserError, match="optimizer='sgd': does not go with use_ema"):
        dataclasses.replace(run, use_ema=True)
    with pytest.raises(UserError, match=r'no_such_package is missing; pip install "atomdiff\[plain\]"'):
        train(run)
    monkeypatch.setitem(OPTIMIZERS, "sgd", dataclasses.replace(spec, needs=None))
    with safe_open(train(run), "pt") as file:
        assert any(file.get_tensor(name).any() for name in file.keys() if name.endswith("atom_delta"))  # noqa: SIM118
