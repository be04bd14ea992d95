"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atomdiff.bases.base import Base, PromptEmbeds
from atomdiff.bases.noise_schedule import prediction_type

if TYPE_CHECKING:
    from torch import Tensor

_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


class StableDiffusion(Base):
    """Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion 1.x, 2.x"
    pipeline_class = "StableDiffusionPipeline"
    pipeline_options: Mapping[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    checkpoint_types: tuple[str, ...] = ("v1", "v2")
    architectures: Mapping[str, str] = {
        "stable-diffusion-v1": "sd_v1",
        "stable-diffusion-v2-512": "sd_v2",
        "stable-diffusion-v2-768-v": "sd_v2_v",
        "stable-diffusion": "",
    }
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    block_names: Mapping[str, str] = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    cross_attention_keys = "attn2.to_k"
    layer_prefixes: Mapping[str, tuple[str, ...]] = {  # kohya's sd-scripts, diffusers, ComfyUI, SimpleTuner
        "unet": ("lora_unet", "unet", "diffusion_model", "lycoris"),
        "text_encoder": (
            "lora_te",
            "lora_te1",
            "text_encoder",
            "text_encoders.clip_l.transformer",
            "text_encoders.clip_h.transformer",
        ),
    }
    embedding_names: Mapping[str, str] = {"text_encoder": "emb_params"}
    takes_flow_scheduler = False

    def matches(self, components: Mapping[str, Any]) -> bool:
        """Return whether a UNet denoises."""
        return self.denoiser in components

    def architecture(self, pipe: Any) -> str:
        """Tell versions by the width of the text encoder, and by what the scheduler says of the prediction."""
        if not type(pipe).__name__.startswith("StableDiffusion"):
            return "other"
        width = getattr(getattr(pipe.components.get("unet"), "config", None), "cross_attention_dim", 0)
        predicts_v = prediction_type(pipe.components.get("scheduler")) == "v_prediction"
        second = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
        return {768: "stable-diffusion-v1", 1024: second}.get(width, "stable-diffusion")

    def size_multiple(self, pipe: Any) -> int:
        """Return by what the VAE and the UNet divide sides, as they halve them again and again."""
        halvings = len(getattr(pipe, self.denoiser).config.block_out_channels) - 1
        return int(pipe.vae_scale_factor) * 2**halvings

    def encode_prompts(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> PromptEmbeds:
        """Return the last hidden states (prompts, 77, hidden) of the text encoder."""
        (encoder,), (ids,) = text_encoders, token_ids
        return PromptEmbeds(encoder(ids.to(encoder.device))[0], None)

    def denoise(
        self, denoiser: Any, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, time_ids: Tensor | None
    ) -> Tensor:
        """Return the UNet's prediction (batch, c, h, w); it is not conditioned on `time_ids`."""
        prediction: Tensor = denoiser(latents, timesteps, embeds.prompt_embeds, return_dict=False)[0]
        return prediction

    def layer_paths(self, component: str, module: str, model: Any) -> list[str]:
        """Return also the path in Stability AI's code, for the UNet."""
        paths = super().layer_paths(component, module, model)
        original = original_path(module, model) if component == self.denoiser else None
        return paths if original is None else [*paths, original]


def original_path(module: str, unet: Any) -> str | None:
    """Return the path of a layer of diffusers' UNet in Stability AI's code (`input_blocks`, ...); None: it has none."""
    if module in _LAYERS:
        return _LAYERS[module]
    match = _IN_BLOCK.fullmatch(module)
    if match is None:
        return None
    side, block, part, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    blocks_each = len(unet.down_blocks[0].resnets) + 1  # down: and a downsampler; up: one more
    number = block * blocks_each + index
    within = int(part == "attentions")
    if part == "resnets":
        rest = _RESNET.get(rest, rest)
    if side == "mid":
        return f"middle_block.{1 if within else 2 * index}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * blocks_each}.0.op"
    if part == "upsamplers":
        position = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
        return f"output_blocks.{(block + 1) * blocks_each - 1}.{position}.{rest}"
    return f"input_blocks.{number + 1}.{within}.{rest}" if side == "down" else f"output_blocks.{number}.{within}.{rest}"
