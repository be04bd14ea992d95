"""A model on the meta device and a CPU tensor do not mix: what is made on the wrong device is found without a GPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.mixed_batch import BatchLayout

LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 16, 3, padding=1), (4, 8, 6, 6)),
    "few positions": (lambda: nn.Conv2d(8, 64, 3, padding=1), (4, 8, 2, 2)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (4, 8, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2), (4, 8, 6, 6)),
    "linear": (lambda: nn.Linear(8, 16), (4, 5, 8)),
}
CONFIGS = {
    "kernels": AtomConfig(channel_block=1),
    "blocks": AtomConfig(channel_block=4),
    "dct": AtomConfig(channel_block=2, basis="dct"),
    "joint": AtomConfig(channel_block=2, joint=True),
    "recursion": AtomConfig(channel_block=1, recursion=2),
    "sparse": AtomConfig(channel_block=2, basis="sparse"),
}


class OneDevice(TorchDispatchMode):
    """Fails on an operation between tensors with axes of two devices, and on such a tensor made on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor) and t.ndim]
        devices = {tensor.device.type for tensor in tensors}
        assert devices <= {"meta"}, f"{func} has tensors on {devices}"
        return result


class OneDeviceAfterMoves(OneDevice):
    """As `OneDevice`, but tensors may be moved."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


def make(layer, config, device="meta"):
    torch.manual_seed(0)
    made = AtomLayer(LAYERS[layer][0]().requires_grad_(False))
    for name, block in (("a", config.channel_block), ("b", 1)):
        settings = copy.deepcopy(config) if name == "a" else AtomConfig(channel_block=block, basis=config.basis)
        made.update_layer(name, settings, "layer")
    made.set_adapter(["a", "b"])
    for name in "ab":
        for atoms in made.atom_sets[name]:
            made.coefficients(name, atoms)
    return made.to(device), torch.randn(LAYERS[layer][1], device="meta", requires_grad=True)


def possible():
    return [(x, y) for x in LAYERS for y in CONFIGS if not (x == "linear" and y == "recursion")]


@pytest.mark.parametrize(("layer", "config"), possible())
@pytest.mark.parametrize("hooked", [False, True])
def test_all_tensors_are_on_the_device_of_the_weight(layer, config, hooked):
    made, x = make(layer, CONFIGS[config])
    if hooked:
        made.base_layer.register_forward_hook(lambda module, inputs, output: output)
    samples = [{"a": 1.0}, {"b": 0.5}, {}, {"a": 0.2, "b": 1.0}]
    with OneDevice():
        made(x).sum().backward()
        assert x.grad.is_meta and all(p.grad.is_meta for p in made.parameters() if p.requires_grad)
        with torch.no_grad():
            expected = made(x).shape
            made.write({"a": 1.0, "b": 1.0})
            assert made(x).shape == expected
            made.unmerge()
    made.mix(BatchLayout(4), samples)  # the weights of samples come from the caller
    with OneDevice(), torch.no_grad():
        assert made(x).shape == expected


@pytest.mark.parametrize(("layer", "config"), possible())
@torch.no_grad()
def test_a_batch_may_be_opened_before_its_weights_are_moved(layer, config):
    made, x = make(layer, CONFIGS[config], "cpu")
    made.mix(BatchLayout(4), [{"a": 1.0}, {"b": 0.5}, {}, {"a": 0.2, "b": 1.0}])
    made.to("meta")
    with OneDeviceAfterMoves():
        assert len(made(x)) == len(x)
