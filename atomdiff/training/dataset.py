"""The dataset of a run: instance and class images as latents, their prompts, and the batch of each forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from atomdiff.bases.find import find_base
from atomdiff.data.buckets import Size, bucket_sizes
from atomdiff.data.latents import LatentCache, LatentEncoder, Latents, concatenate
from atomdiff.data.sampler import bucket_for_pass, sample_order
from atomdiff.sampling.generate import slice_large_images
from atomdiff.training.base_model import BasePipeline, move_to_device, training_resolution
from atomdiff.training.class_images import generate_class_images
from atomdiff.training.config import TrainConfig
from atomdiff.training.preservation import other_prompts, preservation_prompt
from atomdiff.training.summary import describe_images, warn_of_cut_prompts
from atomdiff.training.training_images import (
    TrainingImage,
    check_trigger_words,
    read_class_images,
    read_subject_images,
)
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.tensor_cache import DiskCache


@dataclass(frozen=True)
class EncodedImages:
    """Images of one size, as latents."""

    latents: LatentCache
    prompts: tuple[tuple[int, ...], ...]
    """Indices of each image's prompts: its tags in several orders."""
    epoch: tuple[int, ...]
    """An epoch: the index of each image, as often as it is repeated."""
    names: tuple[str, ...] = ()
    """Folder and file name of each image."""


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass, on the CPU: instance images, then class images."""

    latents: Tensor
    """Clean latents (batch, c, h, w)."""
    prompts: list[int]
    """Index of each sample's prompt."""
    num_instance_images: int
    """How many of the samples are instance images; they come first."""
    time_ids: Tensor
    """SDXL's micro-conditioning (batch, 6), as `Crop` has it."""
    weights: Tensor | None = None
    """Loss weights (batch, 1, h, w) where losses are masked."""
    preservation_prompts: list[int] = field(default_factory=list)
    """Index of the prompt whose prediction stays, for each instance image; empty without output preservation."""
    images: list[str] = field(default_factory=list)
    """Folder and file name of each sample's image."""


@dataclass(frozen=True)
class DreamBoothDataset:
    """What the training steps sample from."""

    prompts: tuple[str, ...]
    """All prompts, each once."""
    instance_images: tuple[EncodedImages, ...]
    """Those of each bucket."""
    class_images: tuple[EncodedImages, ...] | None
    """With prior preservation: all of them, in the size of each bucket."""
    caption_dropout: float = 0.0
    """Share of samples that get the empty prompt."""
    preservation_prompts: Mapping[int, int] = field(default_factory=dict)
    """With output preservation: index of an instance image's prompt -> that of the prompt whose prediction stays."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What images, captions, masks and base are recognized by, see `fingerprint.differences`."""
    description: str = ""
    """What was found, for people to read."""
    held_out_images: tuple[EncodedImages, ...] = ()
    """Images of the subjects that are not trained on, of each bucket that has some."""
    other_prompts: tuple[int, ...] = ()
    """Indices of prompts without a trigger word, for which the base should stay as it is."""

    @property
    def num_instance_images(self) -> int:
        """The number of instance images."""
        return sum(len(images.prompts) for images in self.instance_images)

    def sample(self, number: int, batch_size: int, seed: int, generator: torch.Generator) -> Batch:
        """Sample the batch of a forward pass, all from one bucket.

        Args:
            number: Of the forward pass, counted over all processes from 0; with the seed it chooses the images.
            batch_size: Instance images, and class images if there are any.
            seed: Of the run.
            generator: Chooses everything else, such as the crop of an image and the order of its tags.
        """
        counts = [len(images.epoch) for images in self.instance_images]
        bucket, turn = bucket_for_pass(number, counts, derive_seed(seed, "buckets"))
        sources = [("photos", self.instance_images[bucket], turn)]  # the names belong to the seeds
        if self.class_images is not None:
            sources.append(("class pictures", self.class_images[bucket], number))
        parts: list[Latents] = []
        captions: list[int] = []
        prompts: list[int] = []
        names: list[str] = []
        for name, images, earlier in sources:
            order = sample_order(len(images.epoch), earlier * batch_size, batch_size, derive_seed(seed, name))
            chosen = [images.epoch[index] for index in order]
            parts.append(images.latents.sample(chosen, generator))
            names += [images.names[image] for image in chosen if images.names]
            sampled = self._sample_prompts([images.prompts[image] for image in chosen], generator)
            captions += sampled
            prompts += self._drop_captions(sampled, generator)
        weights = [part.weights for part in parts if part.weights is not None]
        return Batch(
            torch.cat([part.latents for part in parts]),
            prompts,
            batch_size,
            torch.cat([part.time_ids for part in parts]),
            torch.cat(weights) if weights else None,
            [self.preservation_prompts[caption] for caption in captions[:batch_size] if self.preservation_prompts],
            names,
        )

    def _sample_prompts(self, choices: Sequence[Sequence[int]], generator: torch.Generator) -> list[int]:
        """Choose one of each sample's prompts; where there is no choice, nothing random is used."""
        prompts = [prompts[0] for prompts in choices]
        if any(len(prompts) > 1 for prompts in choices):
            share = torch.rand(len(choices), generator=generator).tolist()
            prompts = [prompts[int(part * len(prompts))] for prompts, part in zip(choices, share, strict=True)]
        return prompts

    def _drop_captions(self, prompts: list[int], generator: torch.Generator) -> list[int]:
        """Replace some prompts by the empty one; without dropout, nothing random is used."""
        if not self.caption_dropout:
            return prompts
        empty = self.prompts.index("")
        dropped = (torch.rand(len(prompts), generator=generator) < self.caption_dropout).tolist()
        return [empty if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]


def build_dataset(
    config: TrainConfig, pipe: BasePipeline, accelerator: Accelerator, base: Mapping[str, str]
) -> DreamBoothDataset:
    """Read the instance images, generate the class images that are missing, and encode all; then the VAE is dropped.

    The base has the scheduler that the run generates with, and `base` its keys; it is moved to the run's device.

    Raises:
        UserError: The resolution or a bucket does not suit the base, a folder does not hold what it should, or no
            prompt names the trigger word whose embedding is to be trained.
    """
    side = training_resolution(config, pipe)
    sizes = bucket_sizes(config.aspect_ratio_buckets, side, find_base(pipe.components).size_multiple(pipe))
    by_subject = [read_subject_images(config, config.seed, subject, sizes) for subject in config.subjects]
    instance_images = [image for images, _ in by_subject for image in images]
    held_out = [image for _, images in by_subject for image in images]
    texts = [prompt for image in instance_images for prompt in image.prompts]
    if config.train_token:
        check_trigger_words(config, pipe, texts)
    class_images: list[TrainingImage] = []
    for subject in config.subjects if config.with_prior_preservation else ():
        folder = generate_class_images(config, subject, pipe, accelerator, base)
        limit = config.num_class_images
        class_images += read_class_images(config, config.seed, subject, folder, side // 2, limit)
    if accelerator.is_main_process:
        warned = {"captions": [*instance_images, *held_out], "class prompts": class_images}
        prompts = {name: [image.prompts[0] for image in images] for name, images in warned.items()}
        prompts["validation prompts"] = config.filled_validation_prompts if config.validation_steps else []
        warn_of_cut_prompts(pipe, config, prompts)
    move_to_device(pipe, accelerator, "vae")
    slice_large_images(pipe.vae, side)
    unmasked_weight = config.unmasked_weight if config.masked_loss else None
    encoder = LatentEncoder(pipe.vae, config.sample_batch_size, DiskCache(config.cache_folder), unmasked_weight)
    preserved: dict[str, str] = {}
    if config.preservation != "none":
        preserved = {text: preservation_prompt(config.preservation, config.subjects, text) for text in texts}
    others = other_prompts(config.subjects) if config.validation_loss_interval else ()
    dataset = encode_dataset(
        encoder, accelerator, sizes, instance_images, class_images, held_out, config.caption_dropout, preserved, others
    )
    pipe.vae = None
    move_to_device(pipe, accelerator)
    kinds = {"instance_images": instance_images, "class_images": class_images, "held_out_images": held_out}
    fingerprint: dict[str, Any] = {"base": dict(base)}
    fingerprint |= {kind: [list(image.fingerprint) for image in images] for kind, images in kinds.items()}
    description = describe_images(config, by_subject, len(class_images))
    return replace(dataset, fingerprint=fingerprint, description=description)


def encode_dataset(
    encoder: LatentEncoder,
    accelerator: Accelerator,
    sizes: Sequence[Size],
    instance_images: Sequence[TrainingImage],
    class_images: Sequence[TrainingImage],
    held_out: Sequence[TrainingImage],
    caption_dropout: float,
    preserved: Mapping[str, str],
    others: Sequence[str],
) -> DreamBoothDataset:
    """Encode all images, the class images in every size that instance images are cut to.

    `preserved` are the prompts whose predictions stay, by the instance images' prompts; `others` are prompts without a
    trigger word.
    """
    texts = [prompt for image in (*instance_images, *class_images, *held_out) for prompt in image.prompts]
    texts += [*preserved.values(), *([""] if caption_dropout else []), *others]
    prompts = {text: index for index, text in enumerate(dict.fromkeys(texts))}

    def encode(images: Sequence[TrainingImage], size: Size) -> EncodedImages:
        latents = encode_images(encoder, images, size, accelerator)
        indices = tuple(tuple(prompts[text] for text in image.prompts) for image in images)
        epoch = tuple(index for index, image in enumerate(images) for _ in range(image.repeats))
        return EncodedImages(latents, indices, epoch, tuple(image.name for image in images))

    def encode_by_size(images: Sequence[TrainingImage]) -> tuple[EncodedImages, ...]:
        by_size = {size: [image for image in images if image.bucket == size] for size in sizes}
        return tuple(encode(of_size, size) for size, of_size in by_size.items() if of_size)

    used = [size for size in sizes if any(image.bucket == size for image in instance_images)]
    return DreamBoothDataset(
        tuple(prompts),
        encode_by_size(instance_images),
        tuple(encode(class_images, size) for size in used) if class_images else None,
        caption_dropout,
        {prompts[text]: prompts[stays] for text, stays in preserved.items()},
        held_out_images=encode_by_size(held_out),
        other_prompts=tuple(prompts[text] for text in others),
    )


def encode_images(
    encoder: LatentEncoder, images: Sequence[TrainingImage], size: Size, accelerator: Accelerator
) -> LatentCache:
    """Encode the crops of images; where there are several processes, each encodes its share of the images.

    They exchange the results through the encoder's disk cache.
    """
    if accelerator.num_processes > 1:
        for image in images[accelerator.process_index :: accelerator.num_processes]:
            encoder(image.crop(size))
        accelerator.wait_for_everyone()
    progress = ProgressBar(images, "encoding images", unit="images", disable=not accelerator.is_main_process)
    return concatenate([encoder(image.crop(size)) for image in progress])
