"""Prompts and seeds -> images in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from atomdiff.bases.find import denoiser_of, find_base
from atomdiff.pipelines.hooks import attributes_set
from atomdiff.sampling.config import SIZE_MULTIPLE
from atomdiff.utils.errors import UserError
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.untrusted import list_some

_SLICED_FROM = 768  # pixels


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    batch_size: int = 4,
    progress: bool = True,
    **settings: Any,
) -> list[Image.Image]:
    """Generate one image for each prompt and its seed, as `generate_each`, all of them or none.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: one per image.
        seeds: one per image.
        batch_size: images generated at once.
        progress: show a progress bar that counts images.
        **settings: further arguments of `generate_each`.

    Raises:
        UserError: as for `generate_each`, or the base's safety checker blacked an image out.
    """
    generated = generate_each(pipe, prompts, seeds, batch_size, **settings)
    images: list[Image.Image] = []
    for image in ProgressBar(generated, "generating", len(prompts), unit="images", disable=not progress):
        if image is None:
            blacked_out = describe_blacked_out([(prompts[len(images)], seeds[len(images)])])
            raise UserError(f"{blacked_out}; load it with safety_checker=None")
        images.append(image)
    return images


def generate_each(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    original_prompts: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[Image.Image | None]:
    """Yield one image for each prompt and its seed, batch by batch; None for one that the safety checker blacked out.

    Each image has a CPU generator of its own, so it depends on its prompt and seed but not on its place in a batch, up
    to floating-point rounding.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: one per image.
        seeds: one per image.
        batch_size: images generated at once.
        negative_prompt: one for all images, or one per image.
        height: in pixels; None: the pipeline's default.
        width: in pixels; None: the pipeline's default.
        original_prompts: the prompts as messages quote them; None: `prompts`.
        **settings: further arguments of the pipeline's call, such as `num_inference_steps` and `guidance_scale`.

    Raises:
        ValueError: the numbers of prompts and seeds differ.
        UserError: an image is black or not finite.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"found {len(prompts)} prompts and {len(seeds)} seeds; give one of each per image")
    height, width = image_size(pipe, height, width)
    native = find_base(pipe.components).native_size(pipe) or (0, 0)
    slice_large_images(pipe.vae, max(height or native[0], width or native[1]))
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
    lacking: dict[str, Any] = {}
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):  # it lacks what pipelines with a UNet look up
        lacking = {"init_noise_sigma": 1.0, "scale_model_input": lambda latents, timestep: latents}
    quiet = attributes_set(pipe, _progress_bar_config={"disable": True})
    with quiet, attributes_set(pipe.scheduler, **lacking):
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            negative = None if negatives is None else list(negatives[batch])
            yield from _generate_batch(
                pipe,
                prompts[batch],
                seeds[batch],
                (original_prompts or prompts)[batch],
                negative_prompt=negative,
                generator=generators,
                height=height,
                width=width,
                **settings,
            )


def slice_large_images(vae: Any, side: int) -> None:
    """Let a VAE take images one by one if their sides, in pixels, are large: they need more memory than all else."""
    if side > _SLICED_FROM:
        vae.enable_slicing()


def image_size(pipe: Any, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Return the height and width in pixels to call a pipeline with: both, or None for both.

    Where only one is given, the other is the base's default; diffusers would silently ignore the one given.

    Raises:
        UserError: the base needs multiples of another number.
    """
    unit = math.lcm(SIZE_MULTIPLE, pipe.vae_scale_factor)
    for name, value in (("height", height), ("width", width)):
        if value is not None and value % unit:
            raise UserError(f"{name}={value}: this base needs a multiple of {unit}")
    if (height is None) == (width is None):
        return height, width
    default = find_base(pipe.components).native_size(pipe) or (None, None)
    return height or default[0], width or default[1]


def describe_blacked_out(images: Sequence[tuple[str, int]]) -> str:
    """Return a message that names the images, by prompt and seed, that a safety checker blacked out."""
    named = list_some([f"{prompt!r} with seed {seed}" for prompt, seed in images])
    return f"not saved, as the safety checker of the base blacked them out: {named}"


def _generate_batch(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], original_prompts: Sequence[str], **settings: Any
) -> list[Image.Image | None]:
    """Generate one image per prompt and refuse black and non-finite ones, which overflows make."""
    last: dict[str, Tensor] = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        last["latents"] = state["latents"]
        return state

    output = pipe(list(prompts), output_type="pt", callback_on_step_end=keep, **settings)
    images = output.images.float().cpu()  # (batch, 3, h, w), from 0 to 1
    flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(images)
    latents = last.get("latents", images)
    checked: list[Image.Image | None] = []
    for image, latent, prompt, seed, is_flagged in zip(images, latents, original_prompts, seeds, flagged, strict=True):
        if not is_flagged and not (image.isfinite().all() and image.any()):
            raise UserError(_cause(pipe, f"the image of {prompt!r} with seed {seed}", image, latent))
        checked.append(None if is_flagged else to_pil(image))
    return checked


def to_pil(image: Tensor) -> Image.Image:
    """Return an image (3, h, w) from 0 to 1 as Pillow has it."""
    made: Image.Image = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))[0]
    return made


def _cause(pipe: Any, what: str, image: Tensor, latent: Tensor) -> str:
    """Return a message that says why an image is broken, and what to do."""
    found = "is completely black" if image.isfinite().all() else "has values that are not finite"
    dtype = denoiser_of(pipe).dtype
    half = f" in {str(dtype).removeprefix('torch.')}" if dtype != torch.float32 else ""
    wider = ", or use dtype float32 or bfloat16" if dtype == torch.float16 else ""
    if latent.isfinite().all():
        advice = "use another VAE or lower concept weights" + wider
        return f"{what} {found}: the VAE cannot decode the UNet's latents{half}; {advice}. It is not saved"
    advice = f"lower the weights of the concepts or guidance_scale{wider}"
    return f"{what} {found}: the UNet's values overflow{half}; {advice}. It is not saved"
