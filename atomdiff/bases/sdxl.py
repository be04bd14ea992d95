"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is also conditioned on the size and crop of images.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atomdiff.bases.base import PromptEmbeds
from atomdiff.bases.stable_diffusion import StableDiffusion, original_path
from atomdiff.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL; layers of its UNet are named as in Stability AI's code."""

    name = "Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    pipeline_options: Mapping[str, Any] = {"add_watermarker": False}
    checkpoint_types = ("xl_base",)
    architectures: Mapping[str, str] = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}
    text_encoders = ("text_encoder", "text_encoder_2")
    layer_prefixes: Mapping[str, tuple[str, ...]] = {
        "unet": StableDiffusion.layer_prefixes["unet"],
        "text_encoder": ("lora_te1", "lora_te", *StableDiffusion.layer_prefixes["text_encoder"][2:]),
        "text_encoder_2": ("lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer"),
    }
    embedding_names: Mapping[str, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def matches(self, components: Mapping[str, Any]) -> bool:
        """Return whether there is a UNet that is conditioned on sizes."""
        config = getattr(components.get(self.denoiser), "config", None)
        return getattr(config, "addition_embed_type", None) == "text_time"

    def architecture(self, pipe: Any) -> str:
        """Tell others, such as Kolors, by their class."""
        return "stable-diffusion-xl-v1-base" if "XL" in type(pipe).__name__ else "other"

    def encode_prompts(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> PromptEmbeds:
        """Return the states before the last layer of both encoders side by side, and the second's projection.

        Section 2.1 of the paper.
        """
        import torch

        outputs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(text_encoders, token_ids, strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (prompts, 77, hidden)
        return PromptEmbeds(states, outputs[-1].text_embeds)

    def denoise(
        self, denoiser: Any, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, time_ids: Tensor | None
    ) -> Tensor:
        """Return the UNet's prediction (batch, c, h, w); on `time_ids`: section 2.2 of the paper."""
        added = {"text_embeds": embeds.pooled_prompt_embeds, "time_ids": time_ids}
        conditions = {"encoder_hidden_states": embeds.prompt_embeds, "added_cond_kwargs": added}
        prediction: Tensor = denoiser(latents, timesteps, **conditions, return_dict=False)[0]
        return prediction

    def layer_path(self, component: str, module: str, model: Any) -> str:
        """Return the path in Stability AI's code, for the UNet."""
        if component != self.denoiser:
            return super().layer_path(component, module, model)
        path = original_path(module, model)
        if path is None:
            raise UserError(f"unet.{module} has no name in files for SDXL: leave that layer out, or use --to pipeline")
        return path
