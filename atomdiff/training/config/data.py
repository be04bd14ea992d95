"""How images and captions become training samples, and what keeps the base as it is for other prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atomdiff.data.buckets import parse_buckets
from atomdiff.pipelines.config import GenerationConfig
from atomdiff.utils.choices import Preservation
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import BatchSize, ConfigGroup, NonNegativeFloat, NonNegativeInt, Range, Share
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class ImageConfig(ConfigGroup):
    """Size and augmentation of training images."""

    resolution: Annotated[int, Range(8, 8192)] | None = None
    """Side length of training images in pixels. Default: that of the base model."""
    random_flip: bool = False
    """Flip half of the training images horizontally, at random. Not for subjects with a left and a right."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImageConfig):
    """Crops, captions and masks."""

    center_crop: bool = False
    """Use only the center crop of images that are not square. Default: also the crops at both ends of the long side."""
    aspect_ratio_buckets: str | None = None
    """Sizes for aspect-ratio bucketing, in pixels: "height,width;height,width", or "auto" for sizes of about
    resolution^2 pixels with aspect ratios from 1:4 to 4:1. Each image is cropped to the size closest to its own aspect
    ratio, and all images of a batch have one size. Default: square images only."""
    shuffle_captions: bool = False
    """Shuffle the comma-separated tags of captions (up to 16 orders of each)."""
    keep_tokens: NonNegativeInt = 0
    """Number of tags at the start of a caption that shuffle_captions leaves in place."""
    caption_dropout: Share = 0.0
    """Probability of training a sample with the empty prompt."""
    masked_loss: bool = False
    """Weight the loss by a mask of each instance image, white on the subject: the image of the same name in the
    subfolder mask, or the alpha channel. Images without a mask have weight 1 everywhere."""
    unmasked_weight: Share = 0.0
    """Loss weight of black mask areas, with masked_loss."""
    validation_split: Share = 0.0
    """Share of each subject's instance images that is held out, at least one: never trained on, chosen by the seed, for
    the validation loss. Default: none is."""
    cache_dir: PathText | None = None
    """Folder that caches latents and prompt embeddings for later runs. Runs may share it; it may be deleted at any
    time. Default: cache in output_dir."""

    def check(self) -> None:
        """Check the buckets, and that what is set is used."""
        if self.aspect_ratio_buckets is not None:
            parse_buckets(self.aspect_ratio_buckets)
        if self.keep_tokens and not self.shuffle_captions:
            raise UserError(f"keep_tokens={self.keep_tokens}: expected shuffle_captions with it")
        if self.unmasked_weight and not self.masked_loss:
            raise UserError(f"unmasked_weight={self.unmasked_weight}: expected masked_loss with it")


@dataclass(frozen=True, kw_only=True)
class PreservationConfig(GenerationConfig):
    """Prior preservation, by class images or by the base's own predictions."""

    with_prior_preservation: bool = False
    """Train on class images too (prior preservation), so that the class keeps its look."""
    num_class_images: BatchSize = 100
    """Number of class images."""
    prior_loss_weight: NonNegativeFloat = 1.0
    """Weight of the prior-preservation loss."""
    preservation: Preservation = "none"
    """Output preservation, without class images: keep what the base predicts for the prompts of the instance images
    with the class in place of the trigger word (class), or for the empty prompt (blank). A step takes about twice as
    long, and the memory of twice the batch."""
    preservation_weight: NonNegativeFloat = 1.0
    """Weight of the output-preservation loss."""

    def check(self) -> None:
        """Check that what is set is used."""
        if self.preservation == "none" and self.preservation_weight != 1:
            found = f"preservation_weight={self.preservation_weight}"
            raise UserError(f"{found}: expected preservation class or blank with it")
