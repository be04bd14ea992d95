"""The images of a run as they are trained on: read, with prompts, masks and crops, and refused if they do not do."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from atomdiff.training.config import Subject, TrainConfig
from atomdiff.training.config.data import DataConfig
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


def read_instance_images(config: TrainConfig, subject: Subject, sizes: Sequence[Size]) -> list[TrainingImage]:
    """Read the images of a subject, with their masks if the run wants them.

    Raises:
        UserError: The folder does not hold what it should; the message names the files.
    """
    folder = subject.instance_data_dir
    images = read_images(folder, minimum_side=min(map(min, sizes)) // 2)
    masks = read_masks(folder, images) if config.masked_loss else [None] * len(images)
    tiny, found = [], []
    for image, mask in zip(images, masks, strict=True):
        width, height = image.rgb.size
        bucket = nearest_bucket((height, width), sizes)
        if max(bucket[0] / height, bucket[1] / width) > 2:
            tiny.append(f"{image.name} ({width}x{height} for {bucket[1]}x{bucket[0]})")
        prompts = prompt_variants(config, subject.fill(image.caption or subject.instance_prompt))
        fingerprint = (image.name, image_key(image.rgb), text_key(prompts), image_key(mask) if mask else "")
        crop = partial(crop_image, config, image, mask)
        captioned = image.caption is not None
        found.append(TrainingImage(prompts, crop, bucket, mask is not None, subject.repeats, fingerprint, captioned))
    if tiny:
        raise UserError(f"{folder}: less than half as large as their bucket: {', '.join(tiny)}. Replace or remove them")
    return found


def read_class_images(config: TrainConfig, subject: Subject, folder: Path, minimum_side: int) -> list[TrainingImage]:
    """Read the class images of a subject.

    Raises:
        UserError: The folder does not hold what it should, or images that show nothing.
    """
    images = read_images(folder, minimum_side=minimum_side, limit=config.num_class_images)
    if black := [image.name for image in images if image.rgb.getbbox() is None]:
        cause = "black all over, as a VAE that overflows or a safety checker leaves them"
        raise UserError(f"{folder}: {list_some(black)}: {cause}; remove them: generated ones are generated anew")
    found = []
    for image in images:
        prompts = prompt_variants(config, subject.fill(image.caption or subject.class_prompt))
        fingerprint = (image.name, image_key(image.rgb), text_key(prompts), "")
        found.append(TrainingImage(prompts, partial(make_crops, image.rgb, center_crop=True), fingerprint=fingerprint))
    return found


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


def prompt_variants(config: TrainConfig, text: str) -> tuple[str, ...]:
    """Return a prompt with its tags in the orders that the run wants."""
    if not config.shuffle_captions:
        return (text,)
    return tag_orders(text, config.keep_tokens, derive_seed(config.seed, "tags", text))


def check_masks(config: TrainConfig, images: Sequence[TrainingImage]) -> None:
    """Check that a run with masked loss has a mask at all.

    Raises:
        UserError: It has none.
    """
    if config.masked_loss and not any(image.masked for image in images):
        folder = Path(config.subjects[0].instance_data_dir) / "mask"
        expected = f"masks in {folder}, named like the images, or images with an alpha channel"
        raise UserError(f"masked_loss=True: no image has a mask; expected {expected}")


def check_trigger_words(config: TrainConfig, pipe: BasePipeline, prompts: Sequence[str]) -> None:
    """Check that the base can learn the trigger word of every subject, and that a prompt of its images names it.

    Raises:
        UserError: It cannot, or none does.
    """
    if config.train_token:
        tokens = (placeholder_tokens(subject.trigger_word, config.num_vectors) for subject in config.subjects)
        check_addable(pipe, list(itertools.chain.from_iterable(tokens)))
        check_prompts(config, prompts)


def check_prompts(run: TrainConfig, texts: Sequence[str]) -> None:
    """Check that the prompts of the instance images name the trigger word of every subject.

    Raises:
        UserError: They do not.
    """
    for subject in run.subjects:
        if not any(has_word(text, subject.trigger_word) for text in texts):
            raise UserError(
                f"trigger_word={subject.trigger_word!r}: no prompt names it ({texts[0]!r}, ...), so its embedding "
                "cannot be trained; write it into the prompts, or set train_token to false"
            )
