"""The toybox's base model: a Stable Diffusion of 128x128 images, trained by `benchmarks/pretrain`."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline

from atomdiff.utils.assets import find_asset


def load_toybox(folder: str | Path = "samples/toybox-sd") -> StableDiffusionPipeline:
    """Return the pretrained base in float32."""
    return StableDiffusionPipeline.from_pretrained(find_asset(str(folder)))
