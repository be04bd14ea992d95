"""Options that commands share: the base model, the scheduler, and how images are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atomdiff.utils.choices import PredictionType
from atomdiff.utils.fields import BatchSize, ConfigGroup, Range
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig(ConfigGroup):
    """Base model."""

    pretrained_model_name_or_path: PathText
    """Base model, Stable Diffusion 1.x, 2.x or XL: a folder or Hub id of a diffusers pipeline, or a single checkpoint
    file (.safetensors, .ckpt), local or by its address on the Hub."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a base model on the Hub."""
    variant: str | None = None
    """Variant of the base model's weight files, such as fp16."""
    single_file_config: PathText | None = None
    """Folder or Hub id of a pipeline whose configs describe the single checkpoint file. Default: diffusers' guess from
    the weights, fetched from the Hub; it takes every SD 2.x for 2.1 with v-prediction."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(ConfigGroup):
    """Scheduler."""

    prediction_type: PredictionType | None = None
    """Prediction type of the scheduler. Default: as the concepts were trained, else as the base model's scheduler
    config says."""
    rescale_betas_zero_snr: bool | None = None
    """Rescale the noise schedule to zero terminal SNR. Default: as for prediction_type."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(ConfigGroup):
    """Image generation."""

    num_inference_steps: Annotated[int, Range(1, 1000)] = 30
    """Number of denoising steps."""
    guidance_scale: Annotated[float, Range(0, 1000)] = 7.5
    """Scale of classifier-free guidance; 1 turns it off."""
    sample_batch_size: BatchSize = 4
    """Images that are generated, or encoded to latents, at once, on each process."""
