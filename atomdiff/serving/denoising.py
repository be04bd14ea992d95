"""The state of one image while it is denoised, and the call of the denoiser that several of them share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from atomdiff.bases.base import PromptEmbeds
from atomdiff.bases.find import denoiser_of, find_base
from atomdiff.sampling.generate import slice_large_images
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.schedulers import own_scheduler


@dataclass(frozen=True)
class Geometry:
    """What the images of one call of the denoiser have in common."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    guided: bool
    """Whether there is classifier-free guidance, which takes two predictions an image."""


class Denoising:
    """An image on its way from noise, as its pipeline alone would make it.

    Args:
        pipe: a pipeline of Stable Diffusion.
        scheduler: whose settings its own scheduler has.
        embeds: conditioning on its prompt; with guidance, on the negative prompt and the prompt.
        request: gives seed, steps and guidance; its noise is drawn on the CPU.
        geometry: its size.
    """

    def __init__(
        self, pipe: Any, scheduler: Any, embeds: PromptEmbeds, request: ImageRequest, geometry: Geometry
    ) -> None:
        denoiser = denoiser_of(pipe)
        self.embeds, self.guidance_scale, self.geometry = embeds, request.guidance_scale, geometry
        self._scheduler = own_scheduler(scheduler)
        self._scheduler.set_timesteps(request.num_inference_steps, device=denoiser.device)
        if hasattr(self._scheduler, "set_begin_index"):  # Karras' sigmas may repeat the first timestep
            self._scheduler.set_begin_index(0)
        self._index = 0
        generator = torch.Generator().manual_seed(request.seed)
        takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters
        self._step_options = {"generator": generator} if takes_generator else {}
        sides = (side // pipe.vae_scale_factor for side in (geometry.height, geometry.width))
        shape = (1, denoiser.config.in_channels, *sides)
        noise = randn_tensor(shape, generator=generator, device=denoiser.device, dtype=embeds.prompt_embeds.dtype)
        self.latents = noise * getattr(self._scheduler, "init_noise_sigma", 1.0)

    @property
    def num_steps(self) -> int:
        """Calls of the denoiser from the noise to the image."""
        return len(self._scheduler.timesteps)

    @property
    def progress(self) -> float:
        """Share of the denoising steps done, as weights by step count it."""
        return self._index / max(self.num_steps - 1, 1)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self._index == self.num_steps

    @property
    def timestep(self) -> Tensor:
        """The timestep of the next step."""
        return self._scheduler.timesteps[self._index]

    def model_input(self) -> Tensor:
        """What the denoiser is given in the next step (1, c, h, w)."""
        if hasattr(self._scheduler, "scale_model_input"):
            return self._scheduler.scale_model_input(self.latents, self.timestep)
        return self.latents

    def advance(self, prediction: Tensor) -> None:
        """Take a step.

        Args:
            prediction: the denoiser's (1, c, h, w); with guidance (2, c, h, w), that for the negative prompt first.
        """
        if self.geometry.guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        step = self._scheduler.step(prediction, self.timestep, self.latents, **self._step_options, return_dict=False)
        self.latents = step[0]
        self._index += 1


def encode(
    pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str | None], guided: bool
) -> list[PromptEmbeds]:
    """Return the conditioning on each prompt as its pipeline makes it; with guidance, the negative one first.

    Args:
        pipe: a pipeline of Stable Diffusion.
        prompts: one an image.
        negative_prompts: one an image; all or none of them None.
        guided: whether there is classifier-free guidance.
    """
    found = pipe.encode_prompt(
        prompt=list(prompts),
        device=denoiser_of(pipe).device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if negative_prompts[0] is None else list(negative_prompts),
    )
    positive, negative, pooled, negative_pooled = [*found, None, None][:4]
    if guided:
        positive = torch.stack([negative, positive], 1)  # (prompts, 2, tokens, hidden)
        pooled = None if pooled is None else torch.stack([negative_pooled, pooled], 1)
    else:
        positive, pooled = positive[:, None], None if pooled is None else pooled[:, None]
    return [PromptEmbeds(each, None if pooled is None else pooled[row]) for row, each in enumerate(positive)]


def predict(pipe: Any, rows: Sequence[Denoising]) -> list[Tensor]:
    """Call the denoiser once for images that are each at a step of their own, all of one geometry.

    Returns:
        What `Denoising.advance` takes, for each.
    """
    geometry, device = rows[0].geometry, denoiser_of(pipe).device
    copies = 2 if geometry.guided else 1  # side by side, as those of one sample of a mixed batch
    latents = torch.cat([row.model_input() for row in rows]).repeat_interleave(copies, 0)
    timesteps = torch.stack([row.timestep.to(device, torch.float32) for row in rows]).repeat_interleave(copies)
    prompt_embeds = torch.cat([row.embeds.prompt_embeds for row in rows])
    pooled = None
    if rows[0].embeds.pooled_prompt_embeds is not None:
        pooled = torch.cat([row.embeds.pooled_prompt_embeds for row in rows])  # type: ignore[misc]  # of one base
    size = [geometry.height, geometry.width]
    time_ids = torch.tensor([[*size, 0, 0, *size]] * len(latents), device=device, dtype=latents.dtype)
    embeds = PromptEmbeds(prompt_embeds, pooled)
    prediction = find_base(pipe.components).denoise(denoiser_of(pipe), latents, timesteps, embeds, time_ids)
    return list(prediction.split(copies))


def decode(pipe: Any, latents: Tensor) -> list[tuple[Tensor, bool]]:
    """Decode the latents of finished images (images, c, h, w).

    Returns:
        For each the image (3, h, w) from 0 to 1 in float32, and whether the base's safety checker blacked it out.
    """
    vae = pipe.vae
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)  # it stays so: it would overflow in float16
    mean, std = vae.config.latents_mean, vae.config.latents_std
    latents = latents / vae.config.scaling_factor
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape) + latents.new_tensor(mean).view(shape)
    slice_large_images(vae, max(latents.shape[-2:]) * pipe.vae_scale_factor)
    images = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    flagged = [False] * len(images)
    if getattr(pipe, "safety_checker", None) is not None:
        images, flagged = pipe.run_safety_checker(images, images.device, images.dtype)
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    images = pipe.image_processor.postprocess(images, output_type="pt").float().cpu()
    return [(image, bool(is_flagged)) for image, is_flagged in zip(images, flagged, strict=True)]
