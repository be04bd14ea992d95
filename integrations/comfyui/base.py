"""Where ComfyUI keeps the weights that a concept changes, by the names that diffusers gives the layers."""

from __future__ import annotations

from typing import Any

import comfy.utils
from torch import Tensor

CLIP_NAMES = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}
"""diffusers' name of a text encoder -> ComfyUI's: of Stable Diffusion 1.x and XL, and of 2.x."""


def text_encoder_names(clip: Any) -> dict[str, str]:
    """Return diffusers' name -> ComfyUI's name of each text encoder that a CLIP has."""
    model = clip.cond_stage_model
    return {ours: name for ours, names in CLIP_NAMES.items() for name in names if hasattr(model, name)}


def unet_keys(model: Any) -> dict[str, str]:
    """Return layer, such as `unet.conv_in` -> key of its weight; none where the model is no UNet."""
    of_config = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {f"unet.{layer}": f"diffusion_model.{key}" for layer, key in _weights(of_config).items()}


def text_encoder_keys(clip: Any) -> dict[str, str]:
    """Return layer, such as `text_encoder.text_model.encoder.layers.0.mlp.fc1` -> key of its weight.

    transformers 5 has no `text_model.` in the paths of CLIP's layers any more, so there are both.
    """
    keys: dict[str, str] = {}
    for ours, name in text_encoder_names(clip).items():
        prefix = f"{name}.transformer."
        found = {key.removeprefix(prefix): key for key in clip.cond_stage_model.state_dict() if key.startswith(prefix)}
        for layer, key in _weights(found).items():
            keys |= {f"{ours}.{layer}": key, f"{ours}.{layer.removeprefix('text_model.')}": key}
    return keys


def base_weight(key_patches: Any) -> Tensor:
    """Return the weight without patches, from an entry of `get_key_patches`, in a dtype that one can compute with."""
    weight, convert = key_patches[0]
    weight = convert(weight, inplace=False)
    return weight.float() if weight.itemsize == 1 else weight


def _weights(keys: dict[str, str]) -> dict[str, str]:
    return {key.removesuffix(".weight"): value for key, value in keys.items() if key.endswith(".weight")}
