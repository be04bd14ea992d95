"""The images of a run as they are trained on: read with prompts, masks and crops, and checked."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from atomdiff.data.buckets import Size, nearest_bucket
from atomdiff.data.captions import tag_orders
from atomdiff.data.crops import Crop, make_crops
from atomdiff.data.images import CaptionedImage, read_images
from atomdiff.data.masks import read_masks
from atomdiff.pipelines.placeholder_tokens import check_addable
from atomdiff.pipelines.prompt_syntax import has_word
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.training.base_model import BasePipeline
from atomdiff.training.config import Subject
from atomdiff.training.config.data import DataConfig
from atomdiff.training.config.prompt import PromptConfig
from atomdiff.training.fingerprint import ImageFingerprint, image_key, text_key
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.untrusted import list_some


@dataclass(frozen=True)
class TrainingImage:
    """An image that is trained on, not yet cut."""

    prompts: tuple[str, ...]
    """Its tags in several orders."""
    crop: Callable[[Size], list[Crop]]
    """Gives its crops of a size."""
    bucket: Size | None = None
    """The size that it is cut to; None for the sizes of all instance images."""
    masked: bool = False
    """Whether it has a mask."""
    repeats: int = 1
    """How often it comes in an epoch."""
    fingerprint: ImageFingerprint = ()
    """What it is recognized by, see `fingerprint.py`."""
    captioned: bool = False
    """Whether it has a caption of its own."""
    name: str = ""
    """Its folder and file name."""


def read_subject_images(
    config: DataConfig, seed: int, subject: Subject, sizes: Sequence[Size]
) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """Read the images of a subject that are trained on, and those that are held out for the validation loss.

    Raises:
        UserError: As `read_instance_images`; or no image would be left to train on.
    """
    images = read_instance_images(config, seed, subject, sizes, subject.instance_data_dir)
    if subject.validation_data_dir:
        return images, read_instance_images(config, seed, subject, sizes, subject.validation_data_dir)
    chosen = choose_held_out(len(images), config.validation_split, seed, subject)
    held_out = [image for index, image in enumerate(images) if index in chosen]
    return [image for index, image in enumerate(images) if index not in chosen], held_out


def choose_held_out(count: int, split: float, seed: int, subject: Subject) -> set[int]:
    """Return which of `count` images of a subject are held out: a share of them, at least one unless that is 0.

    Raises:
        UserError: No image would be left to train on.
    """
    held_out = max(1, round(split * count)) if split else 0
    if held_out >= count:
        found = f"found {count} in {subject.instance_data_dir}, of which {held_out} would be held out"
        raise UserError(f"validation_split={split}: {found}; add images, lower it, or use validation_data_dir")
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    return set(torch.randperm(count, generator=generator)[:held_out].tolist())


def read_instance_images(
    config: DataConfig, seed: int, subject: Subject, sizes: Sequence[Size], folder: str
) -> list[TrainingImage]:
    """Read the images of a subject in a folder, with their masks if the run uses them.

    Raises:
        UserError: The folder does not hold what it should; the message names the files.
    """
    images = read_images(folder, minimum_side=min(map(min, sizes)) // 2)
    masks = read_masks(folder, images) if config.masked_loss else [None] * len(images)
    tiny, training_images = [], []
    for image, mask in zip(images, masks, strict=True):
        width, height = image.rgb.size
        bucket = nearest_bucket((height, width), sizes)
        if max(bucket[0] / height, bucket[1] / width) > 2:
            tiny.append(f"{image.name} ({width}x{height} for {bucket[1]}x{bucket[0]})")
        prompts = prompt_variants(config, seed, subject.fill(image.caption or subject.instance_prompt))
        training_images.append(
            TrainingImage(
                prompts,
                partial(crop_image, config, image, mask),
                bucket,
                masked=mask is not None,
                repeats=subject.repeats,
                fingerprint=(image.name, image_key(image.rgb), text_key(prompts), image_key(mask) if mask else ""),
                captioned=image.caption is not None,
                name=f"{Path(folder).name}/{image.name}",
            )
        )
    if tiny:
        raise UserError(f"{folder}: less than half as large as their bucket: {', '.join(tiny)}. Replace or remove them")
    return training_images


def read_class_images(
    config: DataConfig, seed: int, subject: Subject, folder: Path, minimum_side: int, limit: int
) -> list[TrainingImage]:
    """Read the class images of a subject, the first so many of a folder.

    Raises:
        UserError: The folder does not hold what it should, or images that show nothing.
    """
    images = read_images(folder, minimum_side=minimum_side, limit=limit)
    if black := [image.name for image in images if image.rgb.getbbox() is None]:
        cause = "black all over, as a VAE that overflows or a safety checker leaves them"
        raise UserError(f"{folder}: {list_some(black)}: {cause}; remove them: missing ones are generated again")
    training_images = []
    for image in images:
        prompts = prompt_variants(config, seed, subject.fill(image.caption or subject.class_prompt))
        crop = partial(make_crops, image.rgb, center_crop=True)
        fingerprint = (image.name, image_key(image.rgb), text_key(prompts), "")
        training_images.append(
            TrainingImage(prompts, crop, fingerprint=fingerprint, name=f"{folder.name}/{image.name}")
        )
    return training_images


def crop_image(config: DataConfig, image: CaptionedImage, mask: Image.Image | None, size: Size) -> list[Crop]:
    """Return the crops of an image; if nothing counts outside its mask, those that show some of what it marks.

    Raises:
        UserError: None is left.
    """
    crops = make_crops(image.rgb, size, config.center_crop, config.random_flip, mask)
    if mask is None or config.unmasked_weight:
        return crops
    crops = [crop for crop in crops if crop.mask is not None and crop.mask.getbbox()]
    if not crops:
        found = f"cut to {size[1]}x{size[0]}, it shows nothing of what its mask marks"
        raise UserError(f"{image.name}: {found}; crop it yourself, or set center_crop to false or aspect_ratio_buckets")
    return crops


def prompt_variants(config: DataConfig, seed: int, text: str) -> tuple[str, ...]:
    """Return a prompt with its tags in the orders that the run trains on."""
    if not config.shuffle_captions:
        return (text,)
    return tag_orders(text, config.keep_tokens, derive_seed(seed, "tags", text))


def check_trigger_words(config: PromptConfig, pipe: BasePipeline, prompts: Sequence[str]) -> None:
    """Check that the base can learn the trigger word of every subject, and that a prompt of its images has it.

    Raises:
        UserError: It cannot, or none has.
    """
    tokens = (placeholder_tokens(subject.trigger_word, config.num_vectors) for subject in config.subjects)
    check_addable(pipe, list(itertools.chain.from_iterable(tokens)))
    check_prompts(config.subjects, prompts)


def check_prompts(subjects: Sequence[Subject], prompts: Sequence[str]) -> None:
    """Check that the prompts of the instance images have the trigger word of every subject.

    Raises:
        UserError: They do not.
    """
    for subject in subjects:
        if not any(has_word(prompt, subject.trigger_word) for prompt in prompts):
            raise UserError(
                f"trigger_word={subject.trigger_word!r}: no prompt contains it ({prompts[0]!r}, ...), so its embedding "
                "cannot be trained; write it into the prompts, or set train_token to false"
            )
