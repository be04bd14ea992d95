"""Weights and states that are split among processes: what is refused, and that training is the same."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from atomdiff.training.dreambooth import train
from atomdiff.training.resume import how_to_go_on, save_state
from atomdiff.training.run_comparison import compare_tensors
from atomdiff.training.sharding import check_sharding, configure_deepspeed
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

ROOT = Path(__file__).parents[2]
ALLOWED = {"train_token": False, "validation_loss_steps": 0, "max_train_steps": 2, "checkpointing_steps": 1}

# Runs with FSDP2, one after the other, each on two processes that are forked, so that they need not import everything
# again. PyTorch splits weights on CPUs, too, with gloo, but accelerate does it for GPUs alone: it is told of some.
LAUNCHES = """
import json, multiprocessing, os, socket, sys
import diffusers, peft, torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from atomdiff.cli.main import main
from atomdiff.training import dreambooth

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

def work(rank, port, options):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()} | SETTINGS)
    PartialState(cpu=False, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    usual = dreambooth.training_loop
    def noting(started):
        split = [each for each in started.run.trainable.values() if each.to_local().numel() < each.numel()]
        print("split" if split else "whole", flush=True)
        return usual(started)
    dreambooth.training_loop = noting
    sys.exit(main(["train", *options]))

for options in json.loads(sys.argv[1]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(rank, port, options)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    if any(process.exitcode for process in both):
        sys.exit(1)
"""


def accelerator(kind, precision="no", version=2):
    """Stands for accelerate's, on GPUs."""
    plugin = SimpleNamespace(deepspeed_config={"train_micro_batch_size_per_gpu": "auto"})
    return SimpleNamespace(
        distributed_type=kind,
        is_fsdp2=kind == DistributedType.FSDP and version == 2,
        mixed_precision=precision,
        device=torch.device("cpu"),
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


@pytest.fixture
def config(train_config):
    return train_config(**ALLOWED)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"train_token": True, "use_ema": True}, "train_token=True, use_ema=True; expected train_token=False, use_ema"),
        ({"validation_loss_steps": None}, "validation_loss_steps=None; expected validation_loss_steps=0: a process"),
        ({"validation_steps": 1}, "validation_steps=1; expected validation_steps=0"),
        ({"preservation": "class"}, "preservation='class'; expected preservation='none'"),
        ({"optimizer": "prodigy"}, "optimizer='prodigy'; expected optimizer='adamw'"),
        ({"load_in_4bit": True}, "load_in_4bit=True; expected load_in_4bit=False"),
    ],
)
def test_fsdp_refuses_what_needs_whole_weights(config, fields, found):
    check_sharding(config, accelerator(DistributedType.FSDP, "bf16"), AtomConfig())
    with pytest.raises(UserError, match=f"^FSDP: found {found}"):
        check_sharding(dataclasses.replace(config, **fields), accelerator(DistributedType.FSDP), None)


def test_fsdp_refuses_its_first_version_fp16_and_atoms_that_layers_share(config):
    with pytest.raises(UserError, match="found fsdp_version 1 .* expected fsdp_version: 2"):
        check_sharding(config, accelerator(DistributedType.FSDP, version=1), None)
    with pytest.raises(UserError, match="found mixed_precision='fp16'; expected mixed_precision='no' or 'bf16'"):
        check_sharding(config, accelerator(DistributedType.FSDP, "fp16"), None)
    shared = AtomConfig(channel_block=2, basis="dct", share="kind", share_count=2)
    with pytest.raises(UserError, match="found share='kind' in the adapter; expected share=None"):
        check_sharding(config, accelerator(DistributedType.FSDP), shared)


def test_deepspeed_refuses_what_it_would_do_itself(config):
    deepspeed = accelerator(DistributedType.DEEPSPEED)
    alone = dataclasses.replace(config, checkpointing_steps=0, train_token=True)
    check_sharding(alone, deepspeed, None)
    with pytest.raises(UserError, match="^DEEPSPEED: found checkpointing_steps=1; expected checkpointing_steps=0: it"):
        check_sharding(config, deepspeed, None)
    with pytest.raises(UserError, match="found train_text_encoder_ti_frac=0.5; expected train_text_encoder_ti_frac=1"):
        check_sharding(dataclasses.replace(alone, train_text_encoder_ti_frac=0.5), deepspeed, None)
    with pytest.raises(UserError, match="found mixed_precision='bf16'; expected mixed_precision='no': it moves"):
        check_sharding(alone, accelerator(DistributedType.DEEPSPEED, "bf16"), None)


def test_deepspeed_is_told_what_it_would_ask_a_data_loader(config):
    deepspeed = accelerator(DistributedType.DEEPSPEED)
    configure_deepspeed(config, deepspeed)
    told = deepspeed.state.deepspeed_plugin.deepspeed_config
    assert told == {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}
    plain = accelerator(DistributedType.MULTI_GPU)
    configure_deepspeed(config, plain)
    assert plain.state.deepspeed_plugin.deepspeed_config == {"train_micro_batch_size_per_gpu": "auto"}


def test_a_stopped_run_with_deepspeed_says_that_nothing_is_saved(config):
    run = SimpleNamespace(config=config, accelerator=accelerator(DistributedType.DEEPSPEED))
    save_state(run, 1, 0.5, {}, stopping=True)
    assert not Path(config.output_dir).exists() and "nothing is saved" in how_to_go_on(run, 1)


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DEEPSPEED")])
def test_what_accelerate_would_pass_over_is_refused(config, monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UserError, match=f"configured for {name}, but starts MULTI_CPU on cpu; expected .* GPUs"):
        check_sharding(config, accelerator(DistributedType.MULTI_CPU), None)


def test_deepspeed_without_its_package_is_an_error_that_says_so(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("accelerate.accelerator.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match="accelerate cannot start: DeepSpeed is not installed"):
        train(config)


@pytest.mark.slow
def test_split_weights_are_trained_as_whole_ones(config, adapter_file, tmp_path):
    runs = {}
    for method in ("full", "atoms"):
        fields = {"adapter": adapter_file(method), "mixed_precision": "no", "gradient_accumulation_steps": 2}
        runs[method] = dataclasses.replace(config, **fields, output_dir=str(tmp_path / method))
    resumed = dataclasses.replace(runs["full"], resume_from_checkpoint="checkpoint-1")
    launches = []
    for name, run in {"full": runs["full"], "atoms": runs["atoms"], "resumed": resumed}.items():
        fields = {"output_dir": str(tmp_path / "two" / Path(run.output_dir).name), "gradient_accumulation_steps": 1}
        values = dataclasses.asdict(dataclasses.replace(run, **fields))
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps({**values, "validation_prompts": list(run.validation_prompts)}))
        launches.append(["--config", str(file)])
    (tmp_path / "launches.py").write_text(LAUNCHES)

    def launch(*launches):
        command = [sys.executable, str(tmp_path / "launches.py"), json.dumps(launches)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines().count("split") == 2 * len(launches)

    launch(*launches[:2])
    for method, run in runs.items():
        result = train(run)
        compared = compare_tensors(result, tmp_path / "two" / method / result.name)
        assert compared.tensors > 20 and compared.relative < 1e-5
        one, two = (
            torch.load(folder / "checkpoint-2" / "state.pt", weights_only=True)
            for folder in (tmp_path / method, tmp_path / "two" / method)
        )
        for name, parameter in one["parameters"].items():
            torch.testing.assert_close(two["parameters"][name], parameter, atol=2e-5, rtol=1e-4)
        moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (one, two)]
        torch.testing.assert_close(*moments, atol=1e-6, rtol=1e-3)
    (tmp_path / "two" / "full").rename(tmp_path / "uninterrupted")
    (tmp_path / "two" / "full").mkdir()
    (tmp_path / "uninterrupted" / "checkpoint-1").rename(tmp_path / "two" / "full" / "checkpoint-1")
    launch(launches[2])
    resumed = compare_tensors(*(tmp_path / name / "teapot" for name in ("uninterrupted", "two/full")))
    assert resumed.tensors and not resumed.different
