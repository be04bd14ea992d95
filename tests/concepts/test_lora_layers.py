"""Every form of LoRA becomes a plain one with the same delta weight."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.concepts.lora_layers import lora_factors
from atomdiff.export.kohya import layer_name
from tests.concepts.lora_files import FORMS, assert_loads, diff, loha, rand, write_lora
from tests.helpers import assert_unchanged, snapshot


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lora_loads(tiny_pipe, tmp_path, form):
    expected = write_lora(tiny_pipe, tmp_path / "mug.safetensors", FORMS[form])
    assert len(expected) == 8
    assert_loads(tiny_pipe, tmp_path / "mug.safetensors", expected)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["to_q", "ff.net.0.proj"], ["conv1"]])
def test_a_dora_loads_as_diffusers_and_peft_load_it(tiny_pipe, tmp_path, targets):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True, init_lora_weights=False)
    tuned = copy.deepcopy(tiny_pipe)
    tuned.unet.add_adapter(config)
    x, e = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        for name, parameter in tuned.unet.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        expected = tuned.unet(x, 5, e).sample
        tiny_pipe.save_lora_weights(
            tmp_path, get_peft_model_state_dict(tuned.unet), unet_lora_adapter_metadata=config.to_dict()
        )
        before = snapshot(tiny_pipe)
        atomdiff.load_atoms(tiny_pipe, tmp_path, "mug")
        assert (tiny_pipe.unet(x, 5, e).sample - expected).abs().max() < 1e-5
        atomdiff.set_active(tiny_pipe, "mug")  # a second one is worked out on the base, not on what is merged
        atomdiff.load_atoms(tiny_pipe, tmp_path, "cat")
        assert (tiny_pipe.unet(x, 5, e).sample - expected).abs().max() < 1e-5
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dora_of_lycoris_has_magnitudes_of_outputs_or_inputs(tiny_pipe, tmp_path, axis):
    def dora(shape, number):
        tensors, delta = loha(shape, number)
        sizes = [shape[axis] if each == axis else 1 for each in range(len(shape))]
        return tensors | {"dora_scale": rand(*sizes) + 1}, delta

    expected = write_lora(tiny_pipe, tmp_path / "mug.safetensors", dora)
    for (component, module), weight in expected.items():
        name = layer_name(tiny_pipe, component, module)
        others = [each for each in range(weight.ndim) if each != axis]
        magnitude = load_file(tmp_path / "mug.safetensors")[f"{name}.dora_scale"]
        expected[component, module] = magnitude * weight / torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    assert_loads(tiny_pipe, tmp_path / "mug.safetensors", expected)


def test_exact_loras_have_no_more_ranks_than_they_need(tiny_pipe, tmp_path):
    """A difference of (out, in) needs min(out, in), and LoHas the product of theirs."""
    module = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    shape = tiny_pipe.unet.get_submodule(module).weight.shape  # (512, 64)
    for form, rank in ((diff, 64), (loha, 4)):
        name = layer_name(tiny_pipe, "unet", module)
        save_file({f"{name}.{kind}": each for kind, each in form(shape, 0)[0].items()}, tmp_path / "mug.safetensors")
        atomdiff.load_atoms(tiny_pipe, tmp_path / "mug.safetensors", "mug")
        assert tiny_pipe.unet.get_submodule(module).r == {"mug": rank}
        atomdiff.unload_atoms(tiny_pipe)


def test_the_sides_of_a_loha_must_have_one_shape():
    """Else a small file could ask for the memory of a matrix as large as the square of the weight."""
    long, short = rand(1, 4096), rand(1, 1)
    sides = {"hada_w1_a": long, "hada_w1_b": short, "hada_w2_a": short, "hada_w2_b": long}
    with pytest.raises(ValueError, match=r"found \(4096, 1\) and \(1, 4096\) for \(64, 64\) here"):
        lora_factors(sides | {"hada_t1": short, "hada_t2": short}, torch.nn.Linear(64, 64), None)
