"""The second edition of the toybox's base: a Stable Diffusion of the usual classes for 128x128 images."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from atomdiff.toybox import base
from atomdiff.toybox.base import TEXT_WIDTH, make_tokenizer
from atomdiff.toybox.world import CLASSES, COLORS, IMAGE_SIZE, PATTERNS, SCENES

LATENT_CHANNELS = 16
DOWNSAMPLING = 8


def build_vae() -> AutoencoderKL:
    """An autoencoder from (3, 128, 128) to (16, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world and every rare word is one token, others fall into letters."""
    return make_tokenizer([*SCENES.values(), *CLASSES, *COLORS, *PATTERNS])


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model with three layers."""
    return base.build_text_encoder(tokenizer, layers=3)


def build_unet() -> UNet2DConditionModel:
    """A UNet on (16, 16, 16) latents with attention at every resolution: a pattern is the same all over its object.

    The last block has none: without it, a training step on a CPU takes a fifth less time, a prediction as well.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 160, 224),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5, 7),  # diffusers' name for the number of heads, 32 channels each
        norm_num_groups=32,
    )
