"""The base of a training run: load it, reload parts that were freed, and generate images with it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import nn

from atomdiff.bases.find import base_of_class, denoiser_of, find_base, known_bases
from atomdiff.pipelines.config import GenerationConfig
from atomdiff.pipelines.hooks import method_wrapped
from atomdiff.pipelines.open import is_single_file, open_pipeline, pipeline_class
from atomdiff.sampling.generate import generate
from atomdiff.training.config.data import ImageConfig
from atomdiff.training.config.train import TrainingBaseConfig
from atomdiff.utils.errors import UserError

BasePipeline: TypeAlias = DiffusionPipeline


def load_base(config: TrainingBaseConfig, **parts: Any) -> BasePipeline:
    """Load the base in float32, without a safety checker, a watermark, and the parts that are there already.

    Raises:
        UserError: There is no such base, or its architecture is none of `BASES`, from text alone to images.
    """
    name, revision, described_by = config.pretrained_model_name_or_path, config.revision, config.single_file_config
    if described_by and not any(map(is_single_file, (name, config.pretrained_vae_model_name_or_path or ""))):
        raise UserError(f"single_file_config={described_by!r}: describes a checkpoint file, but {name!r} is not one")
    kind = pipeline_class(name, revision=revision, single_file_config=described_by)
    base = base_of_class(kind)
    if base is None:
        raise _wrong_base(name, f"a {kind}")
    if config.pretrained_vae_model_name_or_path is not None and "vae" not in parts:
        parts["vae"] = _load_vae(config.pretrained_vae_model_name_or_path, described_by)
    parts = {**base.pipeline_options, **parts}
    pipe: BasePipeline = open_pipeline(
        name, revision=revision, variant=config.variant, single_file_config=described_by, **parts
    )
    missing = [part for part in base.text_encoders if pipe.components.get(part) is None]
    if missing:
        raise _wrong_base(name, f"a {kind} without {missing[0]}, such as a refiner")
    takes, makes = denoiser_of(pipe).config.in_channels, pipe.vae.config.latent_channels
    if takes != makes:
        raise _wrong_base(name, f"a UNet of {takes} channels, as for inpainting, with a VAE of {makes}")
    return pipe


def copy_base(pipe: BasePipeline, *, share_weights: bool) -> BasePipeline:
    """Return a copy of a base that was loaded, for a run that changes its base.

    Args:
        pipe: Stays as it is.
        share_weights: Let denoiser and VAE have the weights of the original, in its memory; for runs that train neither
            whole.
    """
    base = find_base(pipe.components)
    parts = {}
    for name, part in pipe.components.items():
        known: dict[int, Any] = {}
        if share_weights and name in (base.denoiser, "vae"):  # own parameters, as runs change their type and device
            known = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in part.parameters()}
        parts[name] = copy.deepcopy(part, known)
    copied: BasePipeline = type(pipe)(**{**base.pipeline_options, **parts})
    return copied


def _wrong_base(name: str, found: str) -> UserError:
    expected = f"a pipeline of {known_bases()}, from text to images"
    return UserError(f"pretrained_model_name_or_path={name!r}: found {found}; expected {expected}")


def _load_vae(name: str, single_file_config: str | None) -> AutoencoderKL:
    """Load a VAE: a folder, a Hub id, a pipeline's folder, or a checkpoint file."""
    folder = "vae" if (Path(name) / "vae").is_dir() else None
    try:
        if is_single_file(name):
            described_by = {} if single_file_config is None else {"config": single_file_config, "subfolder": "vae"}
            return AutoencoderKL.from_single_file(name, dtype=torch.float32, **described_by)
        return AutoencoderKL.from_pretrained(name, subfolder=folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        found = f"cannot be loaded as an AutoencoderKL ({' '.join(str(error).split())})"
        raise UserError(f"pretrained_vae_model_name_or_path={name!r}: {found}") from error


def move_to_device(pipe: BasePipeline, accelerator: Accelerator, *names: str) -> None:
    """Move parts of the pipeline, all unless they are named, to the run's device."""
    for name in names or pipe.components:
        if isinstance(part := pipe.components[name], nn.Module):
            part.to(accelerator.device)


@contextmanager
def all_parts_loaded(config: TrainingBaseConfig, pipe: BasePipeline) -> Iterator[None]:
    """Reload the parts of the pipeline that were freed, for the time of a `with` block."""
    parts = ("vae", *find_base(pipe.components).text_encoders)
    missing = [name for name in parts if pipe.components.get(name, pipe) is None]
    if missing:
        loaded = load_base(config, **{name: part for name, part in pipe.components.items() if part is not None})
        pipe.register_modules(**{name: getattr(loaded, name).to(pipe.device) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            setattr(pipe, name, None)


def training_resolution(config: ImageConfig, pipe: BasePipeline) -> int:
    """Return the side of the training images in pixels.

    Raises:
        UserError: It is no multiple of what the base needs.
    """
    base = find_base(pipe.components)
    unit = base.size_multiple(pipe)
    side = config.resolution or max(base.native_size(pipe) or (0,))
    if not side:
        raise UserError(f"resolution={side}: this base does not name one; give a multiple of {unit}")
    if side % unit:
        raise UserError(f"resolution={side}: this base needs a multiple of {unit}")
    return side


def generate_images(
    config: GenerationConfig, pipe: BasePipeline, side: int, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """Generate one square image per prompt, each from its own seed."""
    with _decoding_in_float32(pipe.vae):
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


def _decoding_in_float32(vae: AutoencoderKL) -> AbstractContextManager[None]:
    """Make a `with` block in which autocast leaves the VAE alone: in float16 that of SDXL overflows."""

    def decode_in_float32(decode: Callable[..., Any], latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.float(), *args, **kwargs)

    return method_wrapped(vae, "decode", decode_in_float32)
