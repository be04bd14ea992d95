"""Methods of diffusers that models have otherwise while concepts are loaded."""

import copy

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError


def add(pipe, name, config):
    pipe.unet.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in pipe.unet.named_parameters():
            if f".{name}" in key and "magnitude" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def predict(pipe):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=text).sample


@pytest.mark.parametrize("order", [["atoms", "dora"], ["dora", "atoms"]])
def test_dora_beside_atoms_is_refused_unmerged(tiny_pipe, order):
    configs = {
        "atoms": AtomConfig(target_modules=["conv1", "to_q"]),
        "dora": LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
    }
    before = copy.deepcopy(tiny_pipe.unet.state_dict())
    for name in order:
        add(tiny_pipe, name, configs[name])
    atomdiff.list_atoms(tiny_pipe)  # takes over the methods
    tiny_pipe.unet.set_adapters("dora")
    alone = predict(tiny_pipe)
    with pytest.raises(
        UserError, match=r"'dora' is a LoRA with use_dora, .*to_q: unmerged.*merge both by .*set_active"
    ):
        tiny_pipe.unet.set_adapters(["atoms", "dora"])
    assert torch.equal(predict(tiny_pipe), alone)
    tiny_pipe.unet.set_adapters(["atoms", "dora"], [0.0, 1.0])
    torch.testing.assert_close(predict(tiny_pipe), alone)
    tiny_pipe.unet.set_adapters("atoms")
    atomdiff.set_active(tiny_pipe, ["atoms", "dora"])
    assert (predict(tiny_pipe) - alone).abs().max() > 1e-3
    atomdiff.unload_atoms(tiny_pipe)
    after = tiny_pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
