"""Checkpoints that ComfyUI takes for Stable Diffusion 1.x and XL: random weights, few layers in the UNet."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.comfyui.comfy_stand_in import comfy_name
from tests.comfyui.real_comfy import unet_config
from tests.tiny_models import make_scheduler

UNETS = {
    # ComfyUI tells a model by the first width, the width of the text's states and the numbers of transformer layers.
    "sd1": {
        "block_out_channels": (320, 320),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {  # as Segmind's Vega, which ComfyUI takes for SDXL
        "block_out_channels": (320, 320, 320),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": 5,
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

FULL_SD1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
"""What `UNETS["sd1"]` lacks of Stable Diffusion 1.5."""


def make_pipe(base, **unet):
    """A pipeline with random weights, of ComfyUI's sizes but for the UNet's, in which `unet` may change more."""
    folder = Path(os.environ["COMFYUI_PATH"]) / "comfy"
    configs = [json.loads((folder / name).read_text()) for name in ("sd1_clip_config.json", "clip_config_bigg.json")]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "sd1_tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "unet": UNet2DConditionModel(sample_size=32, **UNETS[base] | unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs[0])),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=256,
            ),
            "scheduler": make_scheduler("epsilon"),
            "tokenizer": tokenizer,
        }
        if base == "sd1":
            return StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        second = CLIPTextModelWithProjection(CLIPTextConfig(**configs[1]))
    return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=second, add_watermarker=False)


def write_checkpoint(pipe, path):
    """Write a pipeline as a checkpoint file in float16."""
    import comfy.diffusers_convert
    import comfy.supported_models
    import comfy.utils

    keys = comfy.utils.unet_to_diffusers(unet_config(pipe.unet))
    state = {f"model.diffusion_model.{keys[key]}": value for key, value in pipe.unet.state_dict().items()}
    vae = comfy.diffusers_convert.convert_vae_state_dict(pipe.vae.state_dict())
    state |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    kind = comfy.supported_models.SD15
    text = {f"clip_l.transformer.{comfy_name(key)}": value for key, value in pipe.text_encoder.state_dict().items()}
    if hasattr(pipe, "text_encoder_2"):
        kind = comfy.supported_models.SDXL
        second = pipe.text_encoder_2.state_dict()
        text |= {f"clip_g.transformer.{comfy_name(key)}": value for key, value in second.items()}
    state |= kind({}).process_clip_state_dict_for_saving(text)
    save_file({key: value.half().contiguous() for key, value in state.items()}, path)
