"""Methods of diffusers that models have otherwise while concepts are loaded."""

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter
from tests.pipelines.helpers import assert_same_bits, bits, predict_repeated

CONFIGS = {
    "atoms": AtomConfig(target_modules=["conv1", "to_q"]),
    "dora": LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
}


@pytest.mark.parametrize("order", [["atoms", "dora"], ["dora", "atoms"]])
def test_dora_beside_atoms_is_refused_unmerged(tiny_pipe, order):
    before = bits(tiny_pipe)
    for name in order:
        add_adapter(tiny_pipe, name, CONFIGS[name])
    atomdiff.list_atoms(tiny_pipe)  # takes over the methods
    tiny_pipe.unet.set_adapters("dora")
    alone = predict_repeated(tiny_pipe)
    for activate in (tiny_pipe.unet.set_adapters, tiny_pipe.unet.set_adapter):
        with pytest.raises(
            UserError, match=r"'dora' is a LoRA with use_dora, .*to_q: unmerged.*merge both with .*set_active"
        ):
            activate(["atoms", "dora"])
        assert torch.equal(predict_repeated(tiny_pipe), alone)
        activate("dora")
        assert torch.equal(predict_repeated(tiny_pipe), alone)
    tiny_pipe.unet.set_adapters(["atoms", "dora"], [0.0, 1.0])
    torch.testing.assert_close(predict_repeated(tiny_pipe), alone)
    tiny_pipe.unet.set_adapter("atoms")
    atomdiff.set_active(tiny_pipe, ["atoms", "dora"])
    assert (predict_repeated(tiny_pipe) - alone).abs().max() > 1e-3
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)
