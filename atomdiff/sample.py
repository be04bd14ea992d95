"""Prompts x seeds x concepts -> pictures: in memory, or as files that a stopped job goes on from."""

import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from atomdiff.errors import UserError
from atomdiff.picture_files import PictureFile, content_hash, listing_hash, write_overview


@dataclass(frozen=True)
class SampleConfig:
    """Draw every prompt with every seed, with any number of concepts in the base.

    Raises:
        UserError: a field has a value that cannot be used.
    """

    pretrained_model_name_or_path: str
    """The base, or a fully tuned pipeline: a folder or a Hub id."""
    output_dir: str = "out/samples"
    """Folder for the pictures, grid.png and manifest.json. What is there with the same settings is not drawn again."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the base while drawing."""

    concepts: tuple[str, ...] = ()
    """Concept files, or directories written by PEFT. Default: the bare base."""
    weights: tuple[float, ...] = ()
    """Strength of each concept; 1 is as trained. Default: 1 each."""
    trigger_words: tuple[str, ...] = ()
    """Word to use for each concept in the prompts, where two come with the same one. Default: their own."""

    prompts: tuple[str, ...] = ()
    """What to draw."""
    prompts_file: str | None = None
    """Text file with further prompts, one a line."""
    negative_prompt: str | None = None
    """What to stay away from."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn once from each seed."""
    num_inference_steps: int = 30
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is none."""
    height: int | None = None
    """Height in pixels. Default: that of the base."""
    width: int | None = None
    """Width in pixels. Default: that of the base."""
    sample_batch_size: int = 4
    """Pictures drawn together, on each process."""

    def __post_init__(self) -> None:
        for path in (*self.concepts, *filter(None, [self.prompts_file])):
            if not Path(path).exists():
                raise UserError(f"found nothing at {path!r}: check the path")
        for name in ("weights", "trigger_words"):
            given = len(getattr(self, name))
            if given and given != len(self.concepts):
                raise UserError(f"found {given} {name} for {len(self.concepts)} concepts; give one each, or none")
        for name in ("num_inference_steps", "height", "width", "sample_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected at least 1")
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds={list(self.seeds)}: expected whole numbers from 0, at least one")

    def read_prompts(self) -> list[str]:
        """Return the prompts given and those in the file, each once, in their order.

        Raises:
            UserError: there is none, or the file is not text.
        """
        lines = list(self.prompts)
        if self.prompts_file is not None:
            try:
                lines += Path(self.prompts_file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"prompts_file={self.prompts_file!r}: cannot be read as text ({error})") from error
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise UserError("found no prompt; give --prompts, or --prompts_file with one a line")
        return prompts


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
    batch_size: int = 4,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Draw `prompts[i]` from `seeds[i]`.

    All of a picture's noise comes from a CPU generator of its own, so that a picture depends on its prompt and seed but
    not on its place in a batch, up to the rounding of float arithmetic.

    Args:
        pipe: a diffusers pipeline from text to images.
        prompts: one a picture.
        seeds: one a picture.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance (Ho, Salimans, arXiv 2207.12598) as in diffusers; 1 is none.
        batch_size: pictures drawn together.
        negative_prompt: what to stay away from, for all pictures.
        height: in pixels; None: that of the pipeline.
        width: in pixels; None: that of the pipeline.
        progress: show a progress bar that counts pictures.

    Raises:
        ValueError: the numbers of prompts and seeds differ.
    """
    drawn = draw_each(
        pipe,
        prompts,
        seeds,
        batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
    )
    return list(tqdm(drawn, "pictures", len(prompts), disable=not progress))


def draw_each(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    negative_prompt: str | None = None,
    **settings: Any,
) -> Iterator[Image.Image]:
    """Yield what `generate` returns, as soon as a batch is drawn; `settings` go to the pipeline as they are."""
    if len(prompts) != len(seeds):
        raise ValueError(f"found {len(prompts)} prompts and {len(seeds)} seeds; give one of each a picture")
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            negative = negative_prompt and [negative_prompt] * len(generators)
            yield from pipe(list(prompts[batch]), negative_prompt=negative, generator=generators, **settings).images
    finally:
        pipe.set_progress_bar_config(**bar)


def save_samples(config: SampleConfig) -> Path:
    """Draw what is missing in `config.output_dir` and lay all of it out in a labelled grid and a JSON manifest.

    Every PNG carries its prompt, seed, concepts and settings as text. One that is there, whole, and carries the same is
    not drawn again, so that a stopped job goes on where it was. Under `accelerate launch` the processes share the work.

    Returns:
        The folder.

    Raises:
        UserError: a prompt, the base or a concept is missing or cannot be used.
    """
    from accelerate import Accelerator

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(config)
    seeds = dict.fromkeys(config.seeds)
    wanted = [PictureFile(folder, prompt, seed, settings) for prompt in config.read_prompts() for seed in seeds]
    missing = [picture for picture in wanted if not picture.is_saved()]

    state = Accelerator(cpu=not torch.accelerator.is_available())
    state.wait_for_everyone()  # all have seen the same files missing
    share = missing[state.process_index :: state.num_processes]
    if share:
        pipe = _load_pipeline(config).to(state.device)
        if state.is_main_process:
            _warn_of_long_prompts(pipe, {picture.prompt for picture in missing})
        images = draw_each(
            pipe,
            [picture.prompt for picture in share],
            [picture.seed for picture in share],
            config.sample_batch_size,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            negative_prompt=config.negative_prompt,
            height=config.height,
            width=config.width,
        )
        bar = tqdm(images, "pictures", len(share), disable=not state.is_main_process)
        for picture, image in zip(share, bar, strict=True):
            picture.save(image)
    state.wait_for_everyone()
    if state.is_main_process:
        write_overview(folder, wanted)
    return folder


def _settings(config: SampleConfig) -> dict[str, str]:
    """What all pictures of a job depend on, with fingerprints of the files."""
    base = Path(config.pretrained_model_name_or_path)
    concepts = [
        {"file": Path(path).name, "sha256": content_hash(Path(path)), "weight": weight, "trigger_word": word}
        for path, word, weight in _concepts(config)
    ]
    facts = {
        "base_model": config.pretrained_model_name_or_path,
        "base_files": listing_hash(base) if base.is_dir() else config.revision,
        "variant": config.variant,
        "dtype": config.dtype,
        "concepts": json.dumps(concepts),
        "negative_prompt": config.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": float(config.guidance_scale),
        "height": config.height,
        "width": config.width,
    }
    return {key: "" if value is None else str(value) for key, value in facts.items()}


def _concepts(config: SampleConfig) -> list[tuple[str, str | None, float]]:
    """Path, trigger word and weight of each concept."""
    words = config.trigger_words or (None,) * len(config.concepts)
    weights = config.weights or (1.0,) * len(config.concepts)
    return list(zip(config.concepts, words, map(float, weights), strict=True))


def _load_pipeline(config: SampleConfig) -> Any:
    """The base with its concepts merged in."""
    from diffusers import DiffusionPipeline

    from atomdiff.pipeline import list_atoms, load_atoms, merge

    name = config.pretrained_model_name_or_path
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name, revision=config.revision, variant=config.variant, dtype=getattr(torch, config.dtype)
        )
    except (OSError, ValueError) as error:
        found = "is there, but" if Path(name).is_dir() else "is no folder here, and as a Hub id"
        reason = " ".join(str(error).split())
        raise UserError(f"pretrained_model_name_or_path={name!r} {found} cannot be loaded ({reason})") from error
    weights = {
        load_atoms(pipe, path, f"concept{number}", trigger_word=word): weight
        for number, (path, word, weight) in enumerate(_concepts(config), start=1)
    }
    adapters = {concept.name: concept.method for concept in list_atoms(pipe) if concept.layers}
    if len(adapters) > 1 or any(weights[name] != 1 for name in adapters):
        try:
            pipe.set_adapters(list(adapters), [weights[name] for name in adapters])
        except AttributeError as error:  # the layers of some methods have no scale
            methods = ", ".join(sorted(set(adapters.values())))
            raise UserError(
                f"found concepts of {methods}: not all can be weighted; draw with one, unweighted"
            ) from error
    merge(pipe)
    return pipe


def _warn_of_long_prompts(pipe: Any, prompts: set[str]) -> None:
    longest = pipe.tokenizer.model_max_length
    for prompt in sorted(prompts):
        tokens = len(pipe.tokenizer(prompt, verbose=False).input_ids)
        if tokens > longest:
            shown = textwrap.shorten(prompt, 60)
            warnings.warn(f"the base reads {longest} of the {tokens} tokens of {shown!r}: shorten it", stacklevel=2)
