"""fp16 with a gradient scaler, tried on the CPU, where runs are refused it because it is slow there; two processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atomdiff.training import dreambooth
from atomdiff.training.base_model import load_base
from atomdiff.training.dreambooth import train
from atomdiff.training.fingerprint import base_keys
from atomdiff.training.noise import set_training_scheduler
from atomdiff.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(train_config):
    return train_config(train_batch_size=1, max_train_steps=2, checkpointing_steps=1)


@pytest.fixture
def fp16(monkeypatch):
    """Let runs be in fp16 on the CPU, from the scale that is put into the list."""
    usual, scale = dreambooth.start_accelerator, [2.0**16]
    monkeypatch.setattr("atomdiff.utils.precision.has_instructions", lambda *_: True)  # not to be warned

    def start(config):
        accelerator = usual(dataclasses.replace(config, mixed_precision="bf16"))
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale[0])
        return accelerator

    monkeypatch.setattr(dreambooth, "start_accelerator", start)
    return scale


def state_of(folder, step):
    return torch.load(Path(folder) / f"checkpoint-{step}" / "state.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"optimizer": "adamw_schedulefree", "gradient_accumulation_steps": 2}])
def test_a_step_that_overflows_is_done_again_with_a_smaller_scale(config, fields, fp16, tmp_path):
    config = dataclasses.replace(config, **fields)
    train(dataclasses.replace(config, output_dir=str(tmp_path / "low")))
    fp16[0] = 2.0**24
    concept = train(config).read_bytes()
    low, high = state_of(tmp_path / "low", 2), state_of(config.output_dir, 2)
    assert low["scaler"]["scale"] == 2.0**16 and high["scaler"]["scale"] < 2.0**24
    for name, expected in low["parameters"].items():
        assert expected.dtype == torch.float32
        torch.testing.assert_close(high["parameters"][name], expected, atol=1e-3, rtol=1e-2)
    log = Path(config.output_dir) / "training_log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
    fp16[0] = 1.0  # which the checkpoint's replaces
    again = dataclasses.replace(config, resume_from_checkpoint="checkpoint-1")
    assert len(train(again).read_bytes()) == len(concept)
    for name, expected in high["parameters"].items():
        assert torch.equal(state_of(config.output_dir, 2)["parameters"][name], expected)


@pytest.mark.slow
def test_gradients_that_never_fit_end_the_run(config, fp16, monkeypatch):
    usual = dreambooth.batch_loss
    calls = []

    def spoilt(run, number):
        loss = usual(run, number)
        if number == 1:
            calls.append(number)
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(dreambooth, "batch_loss", spoilt)
    with pytest.raises(UserError, match="step 2: the gradient's norm is .*checkpoint-1 .*, or with mixed_pr.* bf16"):
        train(config)
    assert len(calls) == 20


@pytest.mark.slow
def test_what_is_trained_is_float32_and_the_rest_is_not(config, fp16, monkeypatch):
    seen, usual = [], dreambooth.train_step
    monkeypatch.setattr(dreambooth, "train_step", lambda run, step: seen.append(run) or usual(run, step))
    train(dataclasses.replace(config, max_train_steps=1))
    (run,) = seen
    assert {parameter.dtype for parameter in run.trainable.values()} == {torch.float32}
    frozen = [parameter for parameter in run.model.denoiser.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.float16}
    base = load_base(config)
    set_training_scheduler(config, base)
    assert run.dataset.fingerprint["base"] == base_keys(base)  # in any precision the same base


TWO = """
import os, sys, torch
from atomdiff.training import dreambooth, resume

found = []
step = dreambooth.train_step
dreambooth.train_step = lambda run, number: found.append(run) or step(run, number)
dreambooth.train(dreambooth.load_config(["--config", sys.argv[1]]))
run = found[0]
torch.save(resume.state_of(run), f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


@pytest.mark.parametrize("fields", [{"optimizer": "prodigy", "use_ema": True}, {"optimizer": "adamw_schedulefree"}])
@pytest.mark.slow
def test_two_processes_have_the_same_numbers(config, fields, tmp_path):
    config = dataclasses.replace(config, **fields, mixed_precision="no")
    values = {**dataclasses.asdict(config), "validation_prompts": list(config.validation_prompts)}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "two.py"), str(tmp_path / "run.yaml"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert {"token_embeddings.text_encoder"} < one["parameters"].keys()
    assert all(torch.equal(one["parameters"][name], two["parameters"][name]) for name in one["parameters"])
    if config.use_ema:
        averages = zip(one["ema"]["shadow_params"], two["ema"]["shadow_params"], strict=True)
        assert all(torch.equal(*pair) for pair in averages)
    alone = dataclasses.replace(config, output_dir=str(tmp_path / "alone"), checkpointing_steps=2)
    train(alone)
    unlike = state_of(alone.output_dir, 2)["parameters"]
    assert not all(torch.equal(one["parameters"][name], unlike[name]) for name in unlike)
