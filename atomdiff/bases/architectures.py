"""Architectures by name and their sizes, to count the parameters of adapters without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atomdiff.bases.find import BASES
from atomdiff.utils.errors import UserError


def open_architecture(name: str) -> nn.Module:
    """Build a model without weights, on the meta device: the denoiser of a pipeline, or a classifier.

    Args:
        name: one of `ARCHITECTURES`, or a folder or Hub id with a config.

    Raises:
        UserError: there is neither such an architecture nor such a config.
    """
    with torch.device("meta"):
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]()
        return _from_config(name)


def _from_config(name: str) -> nn.Module:
    import diffusers
    from transformers import AutoConfig, AutoModelForImageClassification

    folder = Path(name)
    for denoiser, denoiser_class in dict.fromkeys((base.denoiser, base.denoiser_class) for base in BASES):
        try:
            if not folder.is_dir() or (folder / denoiser).is_dir():
                model_class: Any = getattr(diffusers, denoiser_class)
                model: nn.Module = model_class.from_config(model_class.load_config(name, subfolder=denoiser))
                return model
        except (OSError, ValueError):  # no pipeline: a model of its own, perhaps
            pass
    try:
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no architecture {name!r}; known are {', '.join(ARCHITECTURES)}, and folders or Hub ids of a "
            "Stable Diffusion pipeline or an image classifier"
        ) from error
    return model


def _unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(**config)
    return unet


def _sdxl() -> nn.Module:
    return _unet(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def _convnext_base() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], num_labels=1000)
    return ConvNextForImageClassification(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "sd-1.5": lambda: _unet(sample_size=64, cross_attention_dim=768),
    "sd-2.1": lambda: _unet(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl": _sdxl,
    "resnet-50": _resnet50,
    "convnext-base": _convnext_base,
}
"""Names and models: UNets of Stable Diffusion 1.5, 2.1 and XL, and classifiers of 1000 classes."""
