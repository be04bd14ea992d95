"""What a run learns from: photos and class pictures, their prompts and latents, and what each step draws of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from atomdiff.data.buckets import Size, bucket_sizes, nearest_bucket
from atomdiff.data.captions import tag_orders
from atomdiff.data.crops import View, views
from atomdiff.data.images import (
    Photo,
    Picture,
    bucket_turn,
    derive_seed,
    ensure_class_pictures,
    read_photos,
    sample_order,
)
from atomdiff.data.latents import Encoder, LatentCache, join
from atomdiff.data.masks import read_masks
from atomdiff.pipelines.placeholder_tokens import check_addable
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.training.base_keys import base_keys
from atomdiff.training.base_model import (
    BasePipeline,
    generate_images,
    move_to_device,
    size_multiple,
    training_resolution,
)
from atomdiff.training.config import Subject, TrainConfig
from atomdiff.training.fingerprint import Row, image_key, text_key
from atomdiff.training.preflight import check_named
from atomdiff.training.push import validation_prompts
from atomdiff.training.summary import describe_images, warn_of_cut_prompts
from atomdiff.utils.errors import UserError
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.tensor_cache import DiskCache
from atomdiff.utils.untrusted import list_some


@dataclass(frozen=True)
class Pictures:
    """Pictures to train on, all cut to one size."""

    latents: LatentCache
    prompts: tuple[tuple[int, ...], ...]
    """The numbers of each picture's prompts: its tags in several orders."""
    epoch: tuple[int, ...]
    """What an epoch holds: the number of each picture, as often as it is repeated."""


@dataclass(frozen=True)
class Samples:
    """What one forward pass learns from: photos first, then class pictures. On the CPU."""

    latents: Tensor
    """Clean latents (batch, c, h, w)."""
    prompts: list[int]
    """Number of each sample's prompt."""
    instances: int
    """How many of the samples are photos."""
    time_ids: Tensor
    """What SDXL is told of each view (batch, 6): original height and width, crop top and left, target height and width,
    in pixels."""
    weights: Tensor | None = None
    """Loss weights (batch, 1, h, w) where losses are masked."""


@dataclass(frozen=True)
class Material:
    """What the training steps draw from."""

    prompts: tuple[str, ...]
    """All prompts, each once."""
    photos: tuple[Pictures, ...]
    """The subjects', those of each bucket together."""
    class_pictures: tuple[Pictures, ...] | None
    """With prior preservation: all of them for every bucket."""
    caption_dropout: float = 0.0
    """Share of samples that get the empty prompt."""
    known_by: Mapping[str, Any] = field(default_factory=dict)
    """What tells it and the base from others, as `identity.differences` compares it."""
    description: str = ""
    """What was found, for people to read."""

    @property
    def image_count(self) -> int:
        """How many photos there are."""
        return sum(len(pictures.prompts) for pictures in self.photos)

    def draw(self, number: int, batch_size: int, seed: int, generator: torch.Generator) -> Samples:
        """Draw the samples of a forward pass, all from one bucket.

        Args:
            number: Of the forward pass, counted over all processes from 0; with the seed it chooses the pictures.
            batch_size: Photos, and class pictures if there are any.
            seed: Of the run.
            generator: Chooses everything else, such as the view of a picture and the order of its tags.
        """
        counts = [len(pictures.epoch) for pictures in self.photos]
        bucket, turn = bucket_turn(number, counts, derive_seed(seed, "buckets"))
        sources = [("photos", self.photos[bucket], turn)]
        if self.class_pictures is not None:
            sources.append(("class pictures", self.class_pictures[bucket], number))
        drawn, prompts = [], []
        for name, pictures, earlier in sources:
            order = sample_order(len(pictures.epoch), earlier * batch_size, batch_size, derive_seed(seed, name))
            chosen = [pictures.epoch[place] for place in order]
            drawn.append(pictures.latents.draw(chosen, generator))
            prompts += self._draw_prompts([pictures.prompts[picture] for picture in chosen], generator)
        weights = [part.weights for part in drawn if part.weights is not None]
        return Samples(
            torch.cat([part.latents for part in drawn]),
            prompts,
            batch_size,
            torch.cat([part.time_ids for part in drawn]),
            torch.cat(weights) if weights else None,
        )

    def _draw_prompts(self, orders: Sequence[Sequence[int]], generator: torch.Generator) -> list[int]:
        """Draw one of each sample's prompts, or the empty one; nothing is drawn where there is no choice."""
        prompts = [of_one[0] for of_one in orders]
        if any(len(of_one) > 1 for of_one in orders):
            share = torch.rand(len(orders), generator=generator).tolist()
            prompts = [of_one[int(part * len(of_one))] for of_one, part in zip(orders, share, strict=True)]
        if self.caption_dropout:
            empty = self.prompts.index("")
            dropped = (torch.rand(len(orders), generator=generator) < self.caption_dropout).tolist()
            prompts = [empty if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        return prompts


@dataclass(frozen=True)
class Source:
    """A picture as it was read."""

    prompts: tuple[str, ...]
    """Its tags in several orders."""
    cut: Callable[[Size], list[View]]
    """Gives its views of a size."""
    bucket: Size | None = None
    """The size it is cut to; None for all that photos are cut to."""
    masked: bool = False
    """Whether it has a mask."""
    repeats: int = 1
    """How often it comes in an epoch."""
    known_by: Row = ()
    """What tells it from others, see `identity.py`."""
    captioned: bool = False
    """Whether it has a caption of its own."""


def prepare_material(
    config: TrainConfig, pipe: BasePipeline, accelerator: Accelerator, whole: bool = False
) -> Material:
    """Read the photos, draw the class pictures that are missing, and cache all latents; then the VAE is let go.

    Args:
        config: The run.
        pipe: The base, with the scheduler that the run draws with; its parts are moved to the run's device.
        accelerator: Of the run.
        whole: Whether the UNet will be trained as a whole, and so has to keep every bit.

    Raises:
        UserError: The resolution or a bucket does not suit the base, a folder does not hold what it should, or no
            prompt names the trigger word whose vector is to be trained.
    """
    side = training_resolution(config, pipe)
    sizes = bucket_sizes(config.aspect_ratio_buckets, side, size_multiple(pipe))
    of_subjects = {subject.instance_data_dir: read_subject(config, subject, sizes) for subject in config.subjects}
    photos = [source for sources in of_subjects.values() for source in sources]
    if config.masked_loss and not any(photo.masked for photo in photos):
        folder = Path(config.subjects[0].instance_data_dir) / "mask"
        expected = f"masks in {folder}, named like the photos, or photos with an alpha channel"
        raise UserError(f"masked_loss=True: no photo has a mask; expected {expected}")
    if config.train_token:
        check_words(config, pipe, [prompt for photo in photos for prompt in photo.prompts])
    base = base_keys(pipe)
    of_class = []
    for subject in config.subjects if config.with_prior_preservation else ():
        folder = draw_class_pictures(config, subject, pipe, accelerator, side, base, whole)
        pictures = read_photos(folder, minimum_side=side // 2, limit=config.num_class_images)
        refuse_black(folder, pictures)
        for photo in pictures:
            orders = tag_texts(config, subject.fill(photo.caption or subject.class_prompt))
            known_by = (photo.name, image_key(photo.picture), text_key(orders), "")
            of_class.append(Source(orders, partial(views, photo.picture, center_crop=True), known_by=known_by))
    if accelerator.is_main_process:
        firsts = {"captions": photos, "class prompts": of_class}
        checked = {what: [source.prompts[0] for source in sources] for what, sources in firsts.items()}
        shown = validation_prompts(config) if config.validation_steps else []
        warn_of_cut_prompts(pipe, config, checked | {"validation prompts": shown})
    texts = [prompt for source in [*photos, *of_class] for prompt in source.prompts]
    texts += [""] if config.caption_dropout else []
    prompts = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    move_to_device(pipe, accelerator, "vae")
    cache = DiskCache(config.cache_folder)
    encoder = Encoder(pipe.vae, config.sample_batch_size, cache, config.unmasked_weight if config.masked_loss else None)

    def encode(sources: Sequence[Source], size: Size) -> Pictures:
        latents = encode_together(encoder, [partial(source.cut, size) for source in sources], accelerator)
        numbers = tuple(tuple(prompts[text] for text in source.prompts) for source in sources)
        epoch = tuple(number for number, source in enumerate(sources) for _ in range(source.repeats))
        return Pictures(latents, numbers, epoch)

    used = [size for size in sizes if any(photo.bucket == size for photo in photos)]
    material = Material(
        tuple(prompts),
        tuple(encode([photo for photo in photos if photo.bucket == size], size) for size in used),
        tuple(encode(of_class, size) for size in used) if of_class else None,
        config.caption_dropout,
        {
            "base": base,
            "photos": [list(photo.known_by) for photo in photos],
            "class_images": [list(picture.known_by) for picture in of_class],
        },
        describe_images(
            config,
            {
                folder: (len(found), sum(each.captioned for each in found), sum(each.masked for each in found))
                for folder, found in of_subjects.items()
            },
            len(of_class),
            [photo.bucket for photo in photos if photo.bucket is not None],
        ),
    )
    pipe.vae = None
    move_to_device(pipe, accelerator, trained_whole=whole)
    return material


def read_subject(config: TrainConfig, subject: Subject, sizes: Sequence[Size]) -> list[Source]:
    """Read the photos of a subject, with their masks if the run wants them.

    Raises:
        UserError: The folder does not hold what it should; the message names the files.
    """
    folder = subject.instance_data_dir
    photos = read_photos(folder, minimum_side=min(map(min, sizes)) // 2)
    masks = read_masks(folder, photos) if config.masked_loss else [None] * len(photos)
    tiny, sources = [], []
    for photo, mask in zip(photos, masks, strict=True):
        width, height = photo.picture.size
        bucket = nearest_bucket((height, width), sizes)
        if max(bucket[0] / height, bucket[1] / width) > 2:
            tiny.append(f"{photo.name} ({width}x{height} for {bucket[1]}x{bucket[0]})")
        orders = tag_texts(config, subject.fill(photo.caption or subject.instance_prompt))
        cut = partial(cut_photo, config, photo, mask)
        known_by = (photo.name, image_key(photo.picture), text_key(orders), image_key(mask) if mask else "")
        captioned = photo.caption is not None
        sources.append(Source(orders, cut, bucket, mask is not None, subject.repeats, known_by, captioned))
    if tiny:
        raise UserError(f"{folder}: less than half as large as their bucket: {', '.join(tiny)}. Replace or remove them")
    return sources


def refuse_black(folder: Path, pictures: Sequence[Photo]) -> None:
    """Refuse class images that show nothing, as a network whose numbers overflow or a safety checker leaves them.

    Raises:
        UserError: There are such; the message names them.
    """
    if black := [photo.name for photo in pictures if photo.picture.getbbox() is None]:
        cause = "black all over, as a VAE whose numbers overflow or a safety checker leaves them"
        raise UserError(f"{folder}: {list_some(black)}: {cause}; remove them: generated ones are generated anew")


def cut_photo(config: TrainConfig, photo: Photo, mask: Picture | None, size: Size) -> list[View]:
    """Return the views of a photo, but for those that show nothing of what its mask marks, if the rest counts nothing.

    Raises:
        UserError: None is left.
    """
    cut = views(photo.picture, size, config.center_crop, config.random_flip, mask)
    if mask is None or config.unmasked_weight:
        return cut
    cut = [view for view in cut if view.mask is not None and view.mask.getbbox()]
    if not cut:
        what = f"a photo cut to {size[1]}x{size[0]} shows nothing of what its mask marks"
        raise UserError(f"{photo.name}: {what}; crop it yourself, or set center_crop to false or aspect_ratio_buckets")
    return cut


def tag_texts(config: TrainConfig, text: str) -> tuple[str, ...]:
    """Return a prompt with its tags in the orders that the run wants."""
    if not config.shuffle_captions:
        return (text,)
    return tag_orders(text, config.keep_tokens, derive_seed(config.seed, "tags", text))


def check_words(config: TrainConfig, pipe: BasePipeline, texts: Sequence[str]) -> None:
    """Check that the base can learn the trigger word of every subject, and that the photos' prompts name it.

    Raises:
        UserError: It cannot, or they do not.
    """
    words = [
        each for subject in config.subjects for each in placeholder_tokens(subject.trigger_word, config.num_vectors)
    ]
    check_addable(pipe, words)
    check_named(config, texts)


def encode_together(
    encoder: Encoder, cuts: Sequence[Callable[[], list[View]]], accelerator: Accelerator
) -> LatentCache:
    """Encode the views of pictures of one size; where there are several processes, each encodes its share of them.

    Args:
        encoder: Its cache is what the processes exchange their results in.
        cuts: Each gives the views of a picture.
        accelerator: The processes.
    """
    if accelerator.num_processes > 1:
        for cut in cuts[accelerator.process_index :: accelerator.num_processes]:
            encoder(cut())
        accelerator.wait_for_everyone()
    shown = ProgressBar(cuts, "encoding images", unit="images", disable=not accelerator.is_main_process)
    return join([encoder(cut()) for cut in shown])


def draw_class_pictures(
    config: TrainConfig,
    subject: Subject,
    pipe: BasePipeline,
    accelerator: Accelerator,
    side: int,
    drawn_by: Mapping[str, str],
    whole: bool = False,
) -> Path:
    """Let the base draw the class pictures of a subject that are missing, and return their folder.

    Raises:
        UserError: The folder holds pictures that were drawn with other settings, or by another base.
    """
    folder = config.class_folder(subject)
    prompt = subject.fill(subject.class_prompt)
    recipe = {
        "prompt": prompt,
        **drawn_by,
        "side": side,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }

    def draw(numbers: list[int]) -> list[Picture]:
        move_to_device(pipe, accelerator, trained_whole=whole)
        seeds = [derive_seed(0, "class picture", number) for number in numbers]
        return generate_images(config, pipe, [prompt] * len(numbers), seeds)

    share = (accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast():
        ensure_class_pictures(folder, config.num_class_images, config.sample_batch_size, recipe, draw, share)
    accelerator.wait_for_everyone()
    return folder
