"""What comes before the concept itself: accelerate, the base, the pictures and their latents."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from atomdiff.data import (
    LatentCache,
    Picture,
    derive_seed,
    encode_pictures,
    ensure_class_pictures,
    read_photos,
    views,
)
from atomdiff.errors import UserError
from atomdiff.sample import generate
from atomdiff.train_config import TrainConfig

_EXTRAS = {"use_8bit_adam": "bitsandbytes", "enable_xformers_memory_efficient_attention": "xformers"}


@dataclass(frozen=True)
class Pictures:
    """A set of pictures to train on."""

    latents: LatentCache
    prompts: tuple[int, ...]
    """The number of each picture's prompt."""


@dataclass(frozen=True)
class Material:
    """What the training steps draw from."""

    prompts: tuple[str, ...]
    """All prompts, each once."""
    photos: Pictures
    """The subject's."""
    class_pictures: Pictures | None
    """With prior preservation."""


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate with the run's precision, accumulation and tracker.

    Raises:
        UserError: This machine cannot do what is asked, such as fp16 without a GPU.
    """
    for field, package in _EXTRAS.items():
        if getattr(config, field) and find_spec(package) is None:
            raise UserError(f'{field}=True: {package} is missing; pip install "atomdiff[gpu]"')
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # or the precision of this process's first run would stay for all
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # unasked, accelerate takes CPU processes for unrelated ones
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            log_with=config.report_to,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision='fp16': needs a GPU; a CPU can do 'bf16' or 'no'")
    return accelerator


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Open the tracker, if there is one, and give it the run's settings."""
    if config.report_to:
        plain = (bool, int, float, str, type(None))
        fields = {name: value if isinstance(value, plain) else str(value) for name, value in asdict(config).items()}
        accelerator.init_trackers("atomdiff", config=fields)


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


def prepare_material(config: TrainConfig, pipe: StableDiffusionPipeline, accelerator: Accelerator) -> Material:
    """Read the photos, draw the class pictures that are missing, and cache all latents; then the VAE is let go.

    Raises:
        UserError: The resolution does not suit the base, a folder does not hold what it should, or no prompt names the
            trigger word whose vector is to be trained.
    """
    side = training_resolution(config, pipe)
    photos = read_photos(config.instance_data_dir, minimum_side=side // 2)
    texts = [config.fill(photo.caption or config.instance_prompt) for photo in photos]
    word = re.compile(rf"(?<!\w){re.escape(config.trigger_word)}(?!\w)", re.IGNORECASE)
    if config.train_token and not any(word.search(text) for text in texts):
        raise UserError(
            f"trigger_word={config.trigger_word!r}: no prompt names it ({texts[0]!r}, ...), so its vector cannot be "
            "trained; write it into the prompts, or set train_token to false"
        )
    pipe.to(accelerator.device, torch.float32)
    of_class, class_texts = [], []
    if config.with_prior_preservation:
        folder = draw_class_pictures(config, pipe, accelerator, side)
        of_class = read_photos(folder, minimum_side=side // 2, limit=config.num_class_images)
        class_texts = [config.fill(photo.caption or config.class_prompt) for photo in of_class]
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
    config: TrainConfig, pipe: StableDiffusionPipeline, accelerator: Accelerator, side: int
) -> Path:
    """Let the base draw the class pictures that are missing, and return their folder.

    Raises:
        UserError: The folder holds pictures that were drawn with other settings, or by another base.
    """
    folder = Path(config.fill(config.class_data_dir or f"{config.output_dir}/class_images"))
    prompt = config.fill(config.class_prompt)
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
