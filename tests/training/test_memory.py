import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.pipelines.load import load_atoms
from atomdiff.training import launch
from atomdiff.training.dreambooth import train
from atomdiff.training.launch import start_accelerator
from atomdiff.training.memory import quantize, save_memory
from atomdiff.training.method import make_trainable
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

KINDS = ["tiny_pipe", "tiny_sd2_pipe", "tiny_xl_pipe"]


@pytest.fixture(params=KINDS)
def unet(request):
    return request.getfixturevalue(request.param).unet


@pytest.fixture
def config(train_config, tiny_xl_pipe_folder):
    return train_config(pretrained_model_name_or_path=str(tiny_xl_pipe_folder))


def adapted(unet):
    make_trainable(unet, AtomConfig(), 0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return unet.train()


def predict(unet, size=8):
    """What a UNet says of noise that needs no gradient, with whatever text it takes."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.full((2, 6), 32.0)}
    latents = torch.randn(2, 4, size, size, generator=generator)
    return unet(latents, torch.tensor([10, 500]), states, added_cond_kwargs=added).sample


def gradients(unet):
    predict(unet).square().mean().backward()
    found = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.requires_grad}
    unet.zero_grad()
    return found


def test_gradients_reach_every_adapter_parameter_through_checkpoints(unet, config):
    expected = gradients(adapted(unet))
    save_memory(dataclasses.replace(config, gradient_checkpointing=True), unet, torch.float32)
    calls = []
    for module in unet.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, _c=checkpoint: calls.append(a) or _c(*a)
    found = gradients(unet)
    assert calls and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "processor"), [("plain_attention", "AttnProcessor"), ("enable_attention_slicing", "SlicedAttnProcessor")]
)
def test_other_attention_computes_the_same(unet, config, field, processor):
    expected = gradients(adapted(unet))
    assert {type(each).__name__ for each in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    save_memory(dataclasses.replace(config, **{field: True}), unet, torch.float32)
    assert {type(each).__name__ for each in unet.attn_processors.values()} == {processor}
    for name, gradient in gradients(unet).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (("plain_attention", "enable_attention_slicing"), "plain_attention and enable_attention_slicing"),
        (("enable_xformers_memory_efficient_attention", "plain_attention"), "plain_attention and enable_xformers"),
        (("load_in_8bit", "load_in_4bit"), "load_in_8bit and load_in_4bit"),
    ],
)
def test_what_excludes_each_other_is_refused(config, fields, found):
    with pytest.raises(UserError, match=f"found {found}.*: expected at most one of them"):
        dataclasses.replace(config, **dict.fromkeys(fields, True))


def test_xformers_needs_a_gpu(config, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    monkeypatch.setattr(launch, "find_spec", lambda _: True)
    with pytest.raises(UserError, match="enable_xformers_memory_efficient_attention=True: needs a GPU"):
        start_accelerator(dataclasses.replace(config, enable_xformers_memory_efficient_attention=True))


@pytest.mark.parametrize(("bits", "kind", "error"), [(8, "Linear8bitLt", 0.02), (4, "LinearNF4", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_no_adapter_changes_are_quantized(unet, bits, kind, error, dtype):
    pytest.importorskip("bitsandbytes")
    adapted(unet.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected, exact = gradients(unet), predict(unet).detach().float()
        linear = {name for name, module in unet.named_modules() if type(module) is nn.Linear}
        layers = {name for name, module in unet.named_modules() if hasattr(module, "base_layer")}
        left = {name for name in linear if name.removesuffix(".base_layer") in layers}
        assert quantize(unet, bits, dtype) == len(linear - left) > 0
        for name, module in unet.named_modules():
            if name in linear:
                assert type(module).__name__ == ("Linear" if name in left else kind), name
                assert (module.weight.dtype in (torch.int8, torch.uint8)) == (name not in left), name
        assert 0 < (predict(unet).float() - exact).norm() / exact.norm() < error
        unet.eval()
        with torch.no_grad():  # as for validation images
            predict(unet)
        found = gradients(unet.train())
    together = [torch.cat([each[name].flatten().float() for name in expected]) for each in (found, expected)]
    assert (together[0] - together[1]).norm() / together[1].norm() < 2 * error


@pytest.mark.parametrize("field", ["load_in_8bit", "load_in_4bit"])
def test_a_run_on_quantized_weights(config, field, tiny_xl_pipe):
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(config, validation_steps=3, checkpointing_steps=2, **{field: True})
    concept = train(config)
    first = concept.read_bytes()
    train(dataclasses.replace(config, resume_from_checkpoint=str(Path(config.output_dir) / "checkpoint-2")))
    dated = re.compile(rb'"modelspec.date":"[^"]*"')
    assert dated.sub(b"", concept.read_bytes()) == dated.sub(b"", first)
    load_atoms(tiny_xl_pipe, concept)  # by its fingerprint it was made on this base
    assert read_concept_file(concept).training["config"][field] is True


def test_a_run_that_trains_all_weights_has_none_to_quantize(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "full.json").write_text(json.dumps({"peft_type": "FULL"}))
    with pytest.raises(UserError, match="load_in_4bit=True: the UNet has no frozen Linear layer without"):
        train(dataclasses.replace(config, adapter=str(tmp_path / "full.json"), load_in_4bit=True))
