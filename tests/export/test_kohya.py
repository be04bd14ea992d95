"""Files have the names and the layers by which other programs know them."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from peft import LoraConfig
from safetensors.torch import load_file

from atomdiff.bases.architectures import open_architecture
from atomdiff.export.diff import export_diff
from atomdiff.export.kohya import layer_name, zero_layers
from atomdiff.export.lora import export_lora
from atomdiff.export.report import describe_export
from atomdiff.tuner.model import supported_modules
from atomdiff.utils.errors import UserError
from tests.export.helpers import copy_of, generate_latents


def invokeai_width(file):
    """The width by which InvokeAI tells the base: of the first keys that it looks at."""
    widths = {}
    for key, tensor in sorted(file.items()):
        stem, kind = key.split(".", 1)
        if kind not in ("diff", "lora_down.weight"):
            continue
        if stem.startswith("lora_unet_") and stem.endswith(("_attn2_to_k", "_attn2_to_v")):
            return tensor.shape[1]
        if stem.endswith("time_emb_proj") and kind == "lora_down.weight":
            return tensor.shape[1]
        if stem.startswith("lora_te") and "_self_attn_" in stem:
            widths[stem[:8]] = tensor.shape[1]
        if "lora_te_" in widths or len(widths) == 2:
            return sum(widths.values())
    return None


@pytest.mark.slow
@pytest.mark.parametrize("form", [export_diff, export_lora])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_base_of_every_file_is_known_by_its_cross_attention(pipe_template, sdxl_template, tmp_path, kind, form):
    template = {"sd": pipe_template, "sdxl": sdxl_template}[kind]
    width = template.unet.config.cross_attention_dim
    for part, targets in {
        "unet": ["conv_in", "conv1"],
        "text_encoder": ["fc1"],
        "text_encoder_2": ["self_attn.q_proj", "text_projection"],
    }.items():
        pipe = copy_of(template)
        if not hasattr(pipe, part):
            continue
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        report = form(pipe, tmp_path / "x", dtype=torch.float32)
        file = load_file(report.path)
        assert invokeai_width(file) == width
        added = {key for key in file if key.split(".")[0] not in {layer.name for layer in report.layers}}
        names = {key.split(".")[0] for key in added if "attn2_to_k" in key}
        assert len(names) == 1 and not any(file[key].any() for key in added if not key.endswith(".alpha"))
        if form is export_lora and kind == "sd":  # and diffusers loads it all the same
            other = copy_of(template)
            other.load_lora_weights(str(report.path))
            torch.testing.assert_close(
                generate_latents(other, "a mug"), generate_latents(pipe, "a mug"), atol=1e-3, rtol=0
            )


@pytest.mark.slow
@pytest.mark.parametrize("form", [export_diff, export_lora])
def test_an_attention_of_a_text_encoder_is_whole(sdxl_template, tmp_path, form):
    pipe = copy_of(sdxl_template)
    targets = ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]  # what PEFT trains by default
    pipe.text_encoder_2.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    report = form(pipe, tmp_path / "x")
    file = load_file(report.path)
    names = {key.split(".")[0] for key in file if key.startswith("lora_te")}
    attention = "lora_te2_text_model_encoder_layers_1_self_attn"
    assert names == {f"{attention}_{part}_proj" for part in ("q", "k", "v", "out")}
    trained = {layer.name for layer in report.layers}
    assert trained == {f"{attention}_{part}_proj" for part in ("q", "v")}
    kept = {key: tensor for key, tensor in file.items() if not key.endswith(".alpha")}
    assert not any(kept[key].any() for key in kept if key.split(".")[0] not in trained)


@pytest.mark.parametrize(("architecture", "width"), [("sd-1.5", 768), ("sd-2.1", 1024), ("sdxl", 2048)])
def test_files_for_the_real_architectures_are_known(architecture, width):
    unet = open_architecture(architecture)
    pipe = SimpleNamespace(unet=unet, components={"unet": unet})
    layers = supported_modules(unet)
    for ends in (("conv_in",), ("conv1", "conv2"), ("conv1", "time_emb_proj"), ("up_blocks.1.resnets.0.conv1",)):
        names = {layer_name(pipe, "unet", path): layers[path].weight for path in layers if path.endswith(ends)}
        diff = {f"{name}.diff": weight for name, weight in names.items()}
        lora = {f"{name}.lora_down.weight": weight[:1] for name, weight in names.items()}
        for file in (diff, lora):
            assert invokeai_width(file) != width
            assert invokeai_width(file | zero_layers(pipe, file, 1.0)) == width


def test_what_programs_do_not_read_is_reported(sdxl_template, tmp_path):
    pipe = copy_of(sdxl_template)
    targets = ["conv_in", "conv_out", "linear_1", "linear_2", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    targets = ["fc1", "text_projection"]
    pipe.text_encoder_2.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    report = export_lora(pipe, tmp_path / "x", 1)
    kohya = set(report.unread.pop("kohya's merge_lora"))
    assert kohya == {
        f"lora_unet_{name}"
        for name in (
            "input_blocks_0_0",
            "out_2",
            *(f"{part}_{number}" for part in ("time_embed", "label_emb_0") for number in (0, 2)),
        )
    } | {"lora_te2_text_projection"}
    assert report.unread == {"Stable Diffusion WebUI": ("lora_te2_text_projection",)}
    shown = describe_export(report)
    assert "Stable Diffusion WebUI does not read lora_te2_text_projection" in shown
    shown = describe_export(export_diff(pipe, tmp_path / "x"))
    assert "kohya's merge_lora does not read the file: it reads LoRAs only" in shown


def convert(keys, config):
    """The layers that diffusers takes a kohya file's keys for."""
    tensors = {f"{key}.lora_{side}.weight": torch.zeros(1) for key in keys for side in ("down", "up")}
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, config))
    names = {name.removeprefix("unet.").split(".lora.")[0] for name in found}
    names = {name.partition("_lora.")[0].replace(".processor", "") for name in names}
    return {f"{name}.0" if name.endswith("to_out") else name for name in names}


@pytest.mark.parametrize("architecture", ["sd-1.5", "sd-2.1", "sdxl"])
def test_diffusers_finds_every_layer_of_the_real_architectures(architecture):
    unet = open_architecture(architecture)
    layers = set(supported_modules(unet))

    class Pipe:
        components = {"unet": unet}

    Pipe.unet = unet
    names = {module: layer_name(Pipe, "unet", module) for module in layers}
    assert len(set(names.values())) == len(layers)
    assert convert(names.values(), unet.config) == layers


def test_sdxl_layers_have_the_names_of_the_original_code():
    class Pipe:
        unet = open_architecture("sdxl")

    Pipe.components = {"unet": Pipe.unet}
    expected = {  # as in files trained by sd-scripts
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": (
            "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0"
        ),
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.resnets.2.time_emb_proj": "output_blocks_5_0_emb_layers_1",
        "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
        "conv_out": "out_2",
    }
    assert {module: layer_name(Pipe, "unet", module) for module in expected} == {
        module: f"lora_unet_{name}" for module, name in expected.items()
    }
    with pytest.raises(UserError, match="no name"):
        layer_name(Pipe, "unet", "something.else")
