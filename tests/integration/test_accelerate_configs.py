"""The files of configs/accelerate load through accelerate's own classes, and start several processes and machines."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import diffusers.models.attention
import diffusers.models.resnet
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from atomdiff.training.dreambooth import train

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
KINDS = {
    "cpu.yaml": DistributedType.NO,
    "cpu_ddp.yaml": DistributedType.MULTI_GPU,
    "gpu_ddp.yaml": DistributedType.MULTI_GPU,
    "fsdp.yaml": DistributedType.FSDP,
    "deepspeed_zero2.yaml": DistributedType.DEEPSPEED,
}


def test_all_files_are_known():
    assert {file.name for file in FOLDER.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_file_has_only_fields_that_accelerate_knows(name):
    loaded = load_config_from_file(str(FOLDER / name))  # unknown fields are errors, but for those of the groups
    assert isinstance(loaded, ClusterConfig) and loaded.distributed_type == KINDS[name]
    assert loaded.use_cpu == name.startswith("cpu") and loaded.num_processes == (1 if name == "cpu.yaml" else 2)
    options = {action.dest for action in launch_command_parser()._actions}
    groups = [value for value in yaml.safe_load((FOLDER / name).read_text()).values() if isinstance(value, dict)]
    assert len(groups) == (name in ("fsdp.yaml", "deepspeed_zero2.yaml"))
    assert all(group.keys() <= options for group in groups)


def test_the_layers_that_fsdp_wraps_exist():
    layers = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    attention, resnet = layers.split(",")
    assert hasattr(diffusers.models.attention, attention) and hasattr(diffusers.models.resnet, resnet)


@pytest.mark.slow
def test_two_machines_learn_what_one_process_does(train_config, tmp_path):
    fields = {"max_train_steps": 2, "checkpointing_steps": 2, "mixed_precision": "no"}
    config = train_config(**fields, gradient_accumulation_steps=2)
    run = dataclasses.replace(config, output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1)
    values = {**dataclasses.asdict(run), "validation_prompts": list(run.validation_prompts)}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_ddp.yaml")]
    launch += ["--num_machines", "2", "--num_processes", "2", "--same_network"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    script = [str(ROOT / "train_scripts" / "train_dreambooth.py"), "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    machines = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), *script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [machine.communicate(timeout=500)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "report:" in outputs[0] and "report:" not in outputs[1]
    train(config)
    one, two = (
        torch.load(Path(each.output_dir) / "checkpoint-2" / "state.pt", weights_only=True)["parameters"]
        for each in (config, run)
    )
    assert one.keys() == two.keys()
    for name, parameter in one.items():
        assert (two[name] - parameter).abs().max() <= 1e-4 * parameter.abs().max(), name
