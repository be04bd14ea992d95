"""What a run learns from: photos and class pictures, their prompts and latents, and what each step draws of them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor

from atomdiff.base_model import draw_pictures, training_resolution
from atomdiff.data import (
    LatentCache,
    Photo,
    Picture,
    derive_seed,
    encode_pictures,
    ensure_class_pictures,
    read_photos,
    sample_order,
    views,
)
from atomdiff.errors import UserError
from atomdiff.train_config import Subject, TrainConfig


@dataclass(frozen=True)
class Pictures:
    """A set of pictures to train on."""

    latents: LatentCache
    prompts: tuple[int, ...]
    """The number of each picture's prompt."""


@dataclass(frozen=True)
class Samples:
    """What one forward pass learns from: photos first, then class pictures. On the CPU."""

    latents: Tensor
    """Clean latents (batch, c, h, w)."""
    prompts: list[int]
    """Number of each sample's prompt."""
    instances: int
    """How many of the samples are photos."""


@dataclass(frozen=True)
class Material:
    """What the training steps draw from."""

    prompts: tuple[str, ...]
    """All prompts, each once."""
    photos: Pictures
    """The subjects'."""
    class_pictures: Pictures | None
    """With prior preservation."""

    def draw(self, number: int, batch_size: int, seed: int, generator: torch.Generator) -> Samples:
        """Draw the samples of a forward pass.

        Args:
            number: Of the forward pass, counted over all processes from 0; with the seed it chooses the pictures.
            batch_size: Photos, and class pictures if there are any.
            seed: Of the run.
            generator: Chooses everything else, such as the view of a picture.
        """
        latents, prompts = [], []
        for name, pictures in (("photos", self.photos), ("class pictures", self.class_pictures)):
            if pictures is not None:
                count = len(pictures.prompts)
                chosen = sample_order(count, number * batch_size, batch_size, derive_seed(seed, name))
                latents.append(pictures.latents.draw(chosen, generator))
                prompts += [pictures.prompts[picture] for picture in chosen]
        return Samples(torch.cat(latents), prompts, batch_size)


def prepare_material(config: TrainConfig, pipe: StableDiffusionPipeline, accelerator: Accelerator) -> Material:
    """Read the photos, draw the class pictures that are missing, and cache all latents; then the VAE is let go.

    Raises:
        UserError: The resolution does not suit the base, a folder does not hold what it should, or no prompt names the
            trigger word whose vector is to be trained.
    """
    side = training_resolution(config, pipe)
    photos, texts = [], []
    for subject in config.subjects:
        of_subject = read_photos(subject.instance_data_dir, minimum_side=side // 2)
        photos += of_subject
        texts += [subject.fill(photo.caption or subject.instance_prompt) for photo in of_subject]
    for subject in config.subjects if config.train_token else ():
        word = re.compile(rf"(?<!\w){re.escape(subject.trigger_word)}(?!\w)", re.IGNORECASE)
        if not any(word.search(text) for text in texts):
            raise UserError(
                f"trigger_word={subject.trigger_word!r}: no prompt names it ({texts[0]!r}, ...), so its vector cannot "
                "be trained; write it into the prompts, or set train_token to false"
            )
    pipe.to(accelerator.device, torch.float32)
    of_class: list[Photo] = []
    class_texts: list[str] = []
    for subject in config.subjects if config.with_prior_preservation else ():
        folder = draw_class_pictures(config, subject, pipe, accelerator, side)
        drawn = read_photos(folder, minimum_side=side // 2, limit=config.num_class_images)
        of_class += drawn
        class_texts += [subject.fill(photo.caption or subject.class_prompt) for photo in drawn]
    prompts = tuple(dict.fromkeys([*texts, *class_texts]))

    def encode(pictures: Sequence[Sequence[Picture]], named: Sequence[str]) -> Pictures:
        latents = encode_pictures(pipe.vae, pictures, config.sample_batch_size)
        return Pictures(latents, tuple(prompts.index(text) for text in named))

    material = Material(
        prompts,
        encode([views(photo.picture, side, config.center_crop, config.random_flip) for photo in photos], texts),
        encode([views(photo.picture, side, center_crop=True) for photo in of_class], class_texts) if of_class else None,
    )
    pipe.vae = None
    return material


def draw_class_pictures(
    config: TrainConfig, subject: Subject, pipe: StableDiffusionPipeline, accelerator: Accelerator, side: int
) -> Path:
    """Let the base draw the class pictures of a subject that are missing, and return their folder.

    Raises:
        UserError: The folder holds pictures that were drawn with other settings, or by another base.
    """
    usual = Path(config.output_dir) / "class_images" / (subject.name if len(config.subjects) > 1 else "")
    folder = Path(subject.fill(subject.class_data_dir)) if subject.class_data_dir else usual
    prompt = subject.fill(subject.class_prompt)
    recipe = {
        "prompt": prompt,
        "base": hashlib.sha256(pipe.unet.conv_out.weight.detach().cpu().numpy().tobytes()).hexdigest()[:16],
        "side": side,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }

    def draw(numbers: list[int]) -> list[Picture]:
        seeds = [derive_seed(0, "class picture", number) for number in numbers]
        return draw_pictures(config, pipe, [prompt] * len(numbers), seeds)

    share = (accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast():
        ensure_class_pictures(folder, config.num_class_images, config.sample_batch_size, recipe, draw, share)
    accelerator.wait_for_everyone()
    return folder
