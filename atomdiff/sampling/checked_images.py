"""Generated images, looked at before anybody takes them for results: overflows and safety checkers make black ones."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from atomdiff.utils.errors import UserError


def checked_images(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], shown: Sequence[str], **settings: Any
) -> list[Image.Image | None]:
    """Generate one image a prompt, as `pipe` does.

    Args:
        pipe: A diffusers pipeline from text to images.
        prompts: The prompts.
        seeds: Their seeds, for messages.
        shown: The prompts as their author wrote them, for messages.
        **settings: For the pipeline.

    Returns:
        The images; None for one that the pipeline's safety checker blacked out.

    Raises:
        UserError: An image is not finite, or black all over; the message names the prompt and what to do.
    """
    last: dict[str, Tensor] = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        last["latents"] = state["latents"]
        return state

    output = pipe(list(prompts), output_type="pt", callback_on_step_end=keep, **settings)
    images = output.images.float().cpu()  # (batch, 3, h, w), from 0 to 1
    flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(images)
    latents = last.get("latents", images)
    checked: list[Image.Image | None] = []
    for image, latent, prompt, seed, hidden in zip(images, latents, shown, seeds, flagged, strict=True):
        if not hidden and not (image.isfinite().all() and image.any()):
            raise UserError(_cause(pipe, f"the image of {prompt!r} with seed {seed}", image, latent))
        (made,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))
        checked.append(None if hidden else made)
    return checked


def _cause(pipe: Any, what: str, image: Tensor, latent: Tensor) -> str:
    """Say why an image is no result, and what to do."""
    found = "is black all over" if image.isfinite().all() else "has numbers that are not finite"
    half = f" in {str(pipe.unet.dtype).removeprefix('torch.')}" if pipe.unet.dtype != torch.float32 else ""
    wider = ", or use dtype float32 or bfloat16" if pipe.unet.dtype == torch.float16 else ""
    if latent.isfinite().all():
        advice = "use another VAE or lower concept weights" + wider
        return f"{what} {found}: the VAE cannot decode what the UNet made{half}; {advice}. It is not saved"
    advice = f"lower the weights of the concepts or guidance_scale{wider}"
    return f"{what} {found}: the numbers of the UNet overflow{half}; {advice}. It is not saved"
