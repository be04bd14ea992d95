"""Presets on the models that people have, small and with random weights: adapted, merged and back to the bit."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import get_peft_model
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.attach import delete_adapter
from atomdiff.tuner.config import PRESETS
from atomdiff.tuner.merging import merge, restore
from atomdiff.tuner.model import preset_targets
from tests.tiny_models import make_flux2_transformer

BLOCKS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
}
UNET = {
    **BLOCKS,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
XL = {
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPT_EMBEDS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def sd1() -> tuple[nn.Module, dict]:
    return UNet2DConditionModel(**UNET), {"sample": LATENTS, "timestep": 3, "encoder_hidden_states": PROMPT_EMBEDS}


def sdxl() -> tuple[nn.Module, dict]:
    conditions = {"text_embeds": PROMPT_EMBEDS[:, 0, :8], "time_ids": torch.ones(2, 6)}
    inputs = {"sample": LATENTS, "timestep": 3, "encoder_hidden_states": PROMPT_EMBEDS}
    return UNet2DConditionModel(**UNET, **XL), {**inputs, "added_cond_kwargs": conditions}


def controlnet() -> tuple[nn.Module, dict]:
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    model = ControlNetModel(**BLOCKS, down_block_types=blocks, conditioning_embedding_out_channels=(8, 8))
    for module in [*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out]:
        nn.init.normal_(module.weight, std=0.1)  # zero at the start of its training
    inputs = {"sample": LATENTS, "timestep": 3, "encoder_hidden_states": PROMPT_EMBEDS}
    return model, {**inputs, "controlnet_cond": IMAGES[..., :16, :16]}


def resnet() -> tuple[nn.Module, dict]:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    return ResNetForImageClassification(config), {"pixel_values": IMAGES}


def convnext() -> tuple[nn.Module, dict]:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, layer_scale_init_value=1.0)
    return ConvNextForImageClassification(config), {"pixel_values": IMAGES}


def vit() -> tuple[nn.Module, dict]:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    return ViTForImageClassification(config), {"pixel_values": IMAGES}


def flux2() -> tuple[nn.Module, dict]:
    return make_flux2_transformer()


MODELS = {function.__name__: function for function in (sd1, sdxl, controlnet, resnet, convnext, vit, flux2)}
UNETS = {"sd1", "sdxl", "controlnet"}


def randomize_deltas(model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        if "_delta." in key:
            nn.init.normal_(parameter, std=0.1)


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    output = model.eval()(**inputs)
    return torch.cat([tensor.flatten() for tensor in _tensors(output.to_tuple())])


def _tensors(values) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [t for value in values for t in _tensors(value)]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_presets_adapt_real_models_and_leave_no_trace(name, preset):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    if not preset_targets(model, preset):
        assert name not in UNETS
        with pytest.raises(ValueError, match=f"'{preset.replace('+', '.')}' matches no layer .*'all'"):
            get_peft_model(model, AtomConfig(target_modules=preset))
        return
    before, bits = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    get_peft_model(model, AtomConfig(target_modules=preset, channel_block=2))
    assert torch.equal(run(model, inputs), before)
    randomize_deltas(model)
    adapted = run(model, inputs)
    assert not torch.allclose(adapted, before, rtol=1e-3)
    merge(model)
    torch.testing.assert_close(run(model, inputs), adapted, rtol=1e-3, atol=1e-4)
    restore(model)
    delete_adapter(model, "default")
    assert not any(isinstance(module, AtomLayer) for module in model.modules())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bits.items())


def test_presets_of_a_unet_are_what_their_names_say():
    model, _ = sd1()
    targets = {preset: preset_targets(model, preset) for preset in PRESETS}
    assert all(targets["conv+proj"] - targets["conv"])
    assert {name.rpartition(".")[2] for name in targets["conv+proj"] - targets["conv"]} == {
        "proj_in",
        "proj_out",
        "conv_shortcut",
    }
    assert targets["cross_attention"] == {name for name in targets["attention"] if ".attn2." in name}
    assert len(targets["attention"]) == 2 * len(targets["cross_attention"])
    assert {"time_embedding.linear_1"} <= targets["all"] - targets["conv+proj"] - targets["attention"]


def test_attention_is_that_of_blocks_whose_projections_are_fused_too():
    model, _ = flux2()
    double = [f"transformer_blocks.{block}.attn.{name}" for block in range(2) for name in ("to_q", "to_out.0")]
    single = [f"single_transformer_blocks.{block}.attn.{name}" for block in range(2) for name in FUSED]
    found = preset_targets(model, "attention")
    assert {*double, *single} <= found
    assert {name.split(".attn.")[0] for name in found} == {name.split(".attn.")[0] for name in [*double, *single]}


FUSED = ("to_qkv_mlp_proj", "to_out")


def test_a_refused_adapter_leaves_no_name_behind():
    model, _ = sd1()
    for _ in range(2):
        with pytest.raises(ValueError, match="matches no layer"):
            model.add_adapter(AtomConfig(target_modules=["nothing"]), "mug")
    model.add_adapter(AtomConfig(), "mug")
    with pytest.raises(ValueError, match="matches no layer"):
        model.add_adapter(AtomConfig(target_modules=["nothing"]), "robot")
    model.add_adapter(AtomConfig(), "robot")
    assert set(model.peft_config) == {"mug", "robot"}


def test_transformers_loads_every_tensor(tmp_path):
    torch.manual_seed(0)
    model, inputs = vit()
    base, before = model.state_dict(), run(model, inputs)
    base = {key: value.clone() for key, value in base.items()}
    adapted = get_peft_model(model, AtomConfig(target_modules="all", channel_block=2, recursion=2))
    randomize_deltas(model)
    adapted.save_pretrained(tmp_path)
    expected = run(model, inputs)
    reloaded, _ = vit()
    reloaded.load_state_dict(base)
    reloaded.load_adapter(str(tmp_path))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(run(reloaded, inputs), expected)
