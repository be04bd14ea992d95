"""The base of a training run: loaded, put together again after parts were let go, and drawn with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from atomdiff.data import Picture
from atomdiff.errors import UserError
from atomdiff.sample import generate
from atomdiff.train_config import TrainConfig


def load_base(config: TrainConfig, **parts: Any) -> StableDiffusionPipeline:
    """Load the base, without a safety checker.

    Args:
        config: The run.
        **parts: Components that are there already and not to be loaded.

    Raises:
        UserError: There is no such base, or it is not a Stable Diffusion 1.x or 2.x pipeline.
    """
    name = config.pretrained_model_name_or_path
    options = {"revision": config.revision, "variant": config.variant, "safety_checker": None}
    try:
        pipe = DiffusionPipeline.from_pretrained(name, requires_safety_checker=False, **options, **parts)
    except (OSError, ValueError) as error:
        found = f"neither a folder with a pipeline nor one from the Hub ({' '.join(str(error).split())})"
        raise UserError(f"pretrained_model_name_or_path={name!r}: {found}") from error
    if not isinstance(pipe, StableDiffusionPipeline):
        found = f"a {type(pipe).__name__}; expected a StableDiffusionPipeline"
        raise UserError(f"pretrained_model_name_or_path={name!r}: {found}")
    return pipe


@contextmanager
def whole(config: TrainConfig, pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Make a `with` block in which the parts of the pipeline that were let go are back."""
    gone = [name for name in ("vae", "text_encoder") if getattr(pipe, name) is None]
    if gone:
        fresh = load_base(config, **{name: part for name, part in pipe.components.items() if part is not None})
        pipe.register_modules(**{name: getattr(fresh, name).to(pipe.device, torch.float32) for name in gone})
    try:
        yield
    finally:
        for name in gone:
            setattr(pipe, name, None)


def training_resolution(config: TrainConfig, pipe: StableDiffusionPipeline) -> int:
    """Return the side of the training pictures in pixels.

    Raises:
        UserError: The VAE and the UNet cannot halve it as often as they do.
    """
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    side = config.resolution or int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    if side % unit:
        raise UserError(f"resolution={side}: this base needs a multiple of {unit}")
    return side


def draw_pictures(
    config: TrainConfig, pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Picture]:
    """Draw one picture a prompt, each from its own seed, as large as those trained on."""
    side = training_resolution(config, pipe)
    return generate(
        pipe,
        prompts,
        seeds=seeds,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.sample_batch_size,
        height=side,
        width=side,
        progress=False,
    )
