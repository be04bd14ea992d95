"""Any other pipeline of diffusers, into which adapters can be loaded; there is no training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atomdiff.bases.sdxl import StableDiffusionXL
from atomdiff.bases.stable_diffusion import StableDiffusion


class OtherBase(StableDiffusion):
    """A pipeline whose denoiser is a transformer; its text encoders count as those of Stable Diffusion."""

    name = "another pipeline"
    pipeline_class, pipeline_options, checkpoint_types = "", {}, ()
    architectures: Mapping[str, str] = {}
    denoiser, denoiser_class = "transformer", "Transformer2DModel"
    layer_prefixes: Mapping[str, tuple[str, ...]] = {
        component: StableDiffusionXL.layer_prefixes[component] for component in StableDiffusionXL.text_encoders
    }
    takes_flow_scheduler = True

    def matches(self, components: Mapping[str, Any]) -> bool:
        """Match any pipeline."""
        return True

    def architecture(self, pipe: Any) -> str:
        """Return that it is none of those known."""
        return "other"
