"""Sharded training: the gradients of deltas are those of an unsharded model."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from atomdiff.tuner import AtomConfig

CONFIGS = {
    "kernels": AtomConfig(channel_block=1, target_modules="conv"),
    "blocks": AtomConfig(channel_block=4, target_modules="all"),
    "recursion": AtomConfig(channel_block=1, recursion=2, target_modules="conv"),
    "sparse": AtomConfig(channel_block=1, basis="sparse", target_modules="conv"),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(name, frozen_hooks=False):
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding_mode="circular", padding=1)
    )
    base = nn.Sequential(block, nn.Flatten(), nn.Linear(8 * 36, 4)).requires_grad_(False)
    model = get_peft_model(base, copy.deepcopy(CONFIGS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def shard_all(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def shard_layers(model):
    for block in [model.base_model.model[0], model]:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    return model


def shard_base(model):
    """Each base layer for itself, so that its weight is whole in its own call only."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if type(module) in (nn.Conv2d, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def wrap_base(model):
    for module in list(model.modules()):
        if hasattr(module, "base_layer"):
            module.base_layer = FullyShardedDataParallel(
                module.base_layer, use_orig_params=True, device_id=torch.device("cpu")
            )
    return shard_all(model)


SHARDINGS = {"fsdp1": shard_all, "fsdp1, each base": wrap_base, "fsdp2": shard_layers, "fsdp2, each base": shard_base}


def steps(model, x):
    """Losses of three steps, and what is trained after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.filterwarnings("ignore")
def test_sharded_training_learns_as_one_device_does(group, config, sharding):
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    expected = steps(model_of(config), x)
    actual = steps(SHARDINGS[sharding](model_of(config)), x)
    assert expected[2] < 0.99 * expected[0]
    assert actual == pytest.approx(expected, rel=1e-4)
