"""Prompts x seeds x concepts -> pictures: in memory, or as files that a stopped job goes on from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.open import open_pipeline, refuse_other_pipelines
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.pipelines.scheduler import (
    ScheduleConfig,
    common_scheduler,
    describe_scheduler,
    fitting_scheduler,
    schedule_settings,
)
from atomdiff.sampling.checked_images import checked_images
from atomdiff.sampling.output_files import PictureFile, write_overview
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_listing
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.precision import choose_precision, compute_device, log_precision
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.text_files import read_text
from atomdiff.utils.untrusted import list_some

if TYPE_CHECKING:
    from atomdiff.sampling.batching import Line

_SIZE_UNIT = 8  # pixels; what every pipeline of Stable Diffusion asks for
_SEEDS = 2**64  # of PyTorch's generators
_RANGES = {
    "num_inference_steps": (1, 1000),
    "guidance_scale": (0, 1000),
    "height": (_SIZE_UNIT, 8192),
    "width": (_SIZE_UNIT, 8192),
    "sample_batch_size": (1, 4096),
}


@dataclass(frozen=True)
class SampleConfig:
    """Draw every prompt with every seed, with any number of concepts in the base.

    Raises:
        UserError: a field has a value that cannot be used.
    """

    pretrained_model_name_or_path: PathText
    """The base, or a fully tuned pipeline: a folder, a Hub id, or a checkpoint file (.safetensors, .ckpt)."""
    output_dir: PathText = "out/samples"
    """Folder for the pictures, grid.png and manifest.json. What is there with the same settings is not drawn again."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    single_file_config: PathText | None = None
    """Folder or Hub id of a pipeline whose configs describe a base that is one checkpoint file. Default: the one that
    diffusers finds out, from the Hub, which takes every 2.x for the v-predicting 2.1."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base. Default: what accelerate is configured to, else bfloat16 where the processor or GPU has
    instructions for it, else float32."""
    prediction_type: PredictionType | None = None
    """What is predicted, in all pictures. Default: what each picture's concepts were trained to predict, else what the
    base's scheduler config says."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the noise schedule ends in pure noise, in all pictures. Default: as for prediction_type."""

    concepts: tuple[PathText, ...] = ()
    """Concepts that all prompts wear: files, directories written by PEFT, or user/repo on the Hub. Default: the bare
    base."""
    weights: tuple[float | dict[Any, Any], ...] = ()
    """Strength of each concept: a number, 1 is as trained; or JSON, by block of the model and by share of the steps
    done: '{"weight": 0.8, "blocks": {"down": 0.5, "up.1": 0}, "steps": {"0": 1, "1": 0.2}}'. Default: 1 each."""
    trigger_words: tuple[str, ...] = ()
    """Word to use for each concept in the prompts, where two come with the same one. Default: their own."""

    library: PathText | None = None
    """Folder of concept files for single prompts: "a photo of sks mug <atoms:NAME:0.8>" wears NAME.atoms.safetensors of
    that folder with the strength 0.8 (or JSON as for weights; 1 if left out). A prompt takes any number of such tags.
    One that names a concept of --concepts sets its strength there."""

    prompts: tuple[str, ...] = ()
    """What to draw."""
    prompts_file: PathText | None = None
    """Text file with further prompts, one a line; blank lines and those that begin with "# " are left out."""
    negative_prompt: str | None = None
    """What to stay away from."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn once from each seed."""
    num_inference_steps: int = 30
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is none."""
    height: int | None = None
    """Height in pixels, a multiple of 8. Default: that of the base."""
    width: int | None = None
    """Width in pixels, a multiple of 8. Default: that of the base."""
    sample_batch_size: int = 4
    """Pictures drawn together, on each process."""

    def __post_init__(self) -> None:
        expand_paths(self)
        for path in filter(None, (self.prompts_file, self.library)):
            if not Path(path).exists():
                raise UserError(f"found nothing at {path!r}: check the path")
        command_line_weights(self.concepts, self.weights, self.trigger_words)
        if self.negative_prompt and split_tags(self.negative_prompt)[1]:
            raise UserError(
                f"negative_prompt={self.negative_prompt!r}: only prompts can wear concepts; take the tag out"
            )
        ScheduleConfig(self.prediction_type)  # refuses what it does not know
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"{name}={value}: expected {least} to {most}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and value % _SIZE_UNIT:
                raise UserError(f"{name}={value}: expected a multiple of {_SIZE_UNIT}")
        if not self.seeds or not 0 <= min(self.seeds) <= max(self.seeds) < _SEEDS:
            raise UserError(f"seeds={list(self.seeds)}: expected whole numbers from 0 to 2^64 - 1, at least one")

    def read_prompts(self) -> list[str]:
        """Return the prompts given and those in the file, each once, in their order.

        Raises:
            UserError: there is none, or the file is not text.
        """
        lines = list(self.prompts)
        if self.prompts_file is not None:
            written = read_text(self.prompts_file).split("\n")
            lines += [line for line in written if not f"{line.strip()} ".startswith("# ")]
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
        UserError: an image is not finite or black, or the base's safety checker blacked it out.
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
    images = []
    for number, image in enumerate(ProgressBar(drawn, "images", len(prompts), unit="images", disable=not progress)):
        if image is None:
            raise UserError(f"{hidden_images([(prompts[number], seeds[number])])}; load it with safety_checker=None")
        images.append(image)
    return images


def draw_each(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    shown: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[Image.Image | None]:
    """Yield what `generate` returns, as soon as a batch is drawn; `settings` go to the pipeline as they are.

    There may be a negative prompt for each picture, and what messages call its prompt, `shown`. None stands for a
    picture that the safety checker blacked out.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"found {len(prompts)} prompts and {len(seeds)} seeds; give one of each a picture")
    height, width = image_size(pipe, height, width)
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):  # it lacks what pipelines with a UNet look up
        pipe.scheduler.init_noise_sigma = 1.0
        pipe.scheduler.scale_model_input = lambda latents, timestep: latents
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
            negative = None if negatives is None else list(negatives[batch])
            yield from checked_images(
                pipe,
                prompts[batch],
                seeds[batch],
                (shown or prompts)[batch],
                negative_prompt=negative,
                generator=generators,
                height=height,
                width=width,
                **settings,
            )
    finally:
        pipe.set_progress_bar_config(**bar)


def image_size(pipe: Any, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Return the height and width in pixels that a pipeline takes: both, or None for both.

    One that is not given is that of the base; diffusers would ignore the other without a word.

    Raises:
        UserError: The base needs multiples of another number.
    """
    unit = math.lcm(_SIZE_UNIT, pipe.vae_scale_factor)
    for name, value in (("height", height), ("width", width)):
        if value is not None and value % unit:
            raise UserError(f"{name}={value}: this base needs a multiple of {unit}")
    if (height is None) == (width is None):
        return height, width
    side = pipe.unet.config.sample_size
    usual = [each * pipe.vae_scale_factor for each in (side if isinstance(side, (list, tuple)) else (side, side))]
    return height or usual[0], width or usual[1]


def hidden_images(images: Sequence[tuple[str, int]]) -> str:
    """Say which images, by prompt and seed, a safety checker blacked out."""
    named = list_some([f"{prompt!r} with seed {seed}" for prompt, seed in images])
    return f"not saved, as the safety checker of the base blacked them out: {named}"


def save_samples(config: SampleConfig) -> Path:
    """Draw what is missing in `config.output_dir` and lay all of it out in a labelled grid and a JSON manifest.

    Every PNG carries its prompt, seed, concepts and settings as text. One that is there, whole, and carries the same is
    not drawn again, so that a stopped job goes on where it was. Under `accelerate launch` the processes share the work.

    Returns:
        The folder.

    Raises:
        UserError: a prompt, the base or a concept is missing or cannot be used, a prompt wears concepts that cannot be
            drawn by one scheduler, or a picture is not finite, black or blacked out, which then is not saved.
    """
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from atomdiff.concepts.library import ConceptLibrary
    from atomdiff.sampling.batching import given_concepts, in_order, read_lines, share_of, warn_of_prompts
    from atomdiff.sampling.output_files import refuse_foreign_images
    from atomdiff.utils.paths import check_writable, refuse_overlap

    given = given_concepts(config.concepts, config.weights, config.trigger_words)
    library = None if config.library is None else ConceptLibrary(config.library)
    lines = read_lines(config.read_prompts(), given, library)

    folder = Path(config.output_dir)
    directories = {f"the concept {concept.file}": concept.path for line in lines for concept, _ in line.concepts}
    refuse_overlap({"output_dir": folder}, {"the base": config.pretrained_model_name_or_path, **directories})
    refuse_foreign_images(folder)
    check_writable(folder, f"output_dir={config.output_dir!r}")
    precision = choose_precision(config.dtype, compute_device(), field="dtype")
    settings = _settings(config, str(precision.dtype).removeprefix("torch."))
    jobs = [
        (PictureFile(folder, line.prompt, seed, settings | {"concepts": line.facts}), line)
        for line in lines
        for seed in dict.fromkeys(config.seeds)
    ]
    missing = in_order([job for job in jobs if not job[0].is_saved()], line_of=itemgetter(1))

    state = Accelerator(cpu=not torch.accelerator.is_available())
    state.wait_for_everyone()  # all have seen the same files missing
    share = share_of(missing, state.process_index, state.num_processes)
    hidden: list[tuple[str, int]] = []
    if share:
        refuse_other_pipelines(
            config.pretrained_model_name_or_path, revision=config.revision, single_file_config=config.single_file_config
        )
        pipe = open_pipeline(
            config.pretrained_model_name_or_path,
            precision.dtype,
            revision=config.revision,
            variant=config.variant,
            single_file_config=config.single_file_config,
        ).to(state.device)
        lines = list(dict.fromkeys(line for _, line in missing))
        schedulers = _schedulers(config, pipe, lines)
        log_precision(precision, state.device)
        if state.is_main_process:
            warn_of_prompts(pipe, lines)
            _tell_schedulers(pipe.scheduler, schedulers)
        bar = ProgressBar(
            _draw(config, pipe, share, schedulers),
            "images",
            len(share),
            unit="images",
            disable=not state.is_main_process,
        )
        for picture, image in bar:
            if image is None:
                hidden.append((picture.prompt, picture.seed))
            else:
                picture.save(image)
    state.wait_for_everyone()
    if hidden := gather_object(hidden):
        raise UserError(f"{hidden_images(hidden)}; the others are in {folder}: change these prompts or seeds")
    if state.is_main_process:
        write_overview(folder, [picture for picture, _ in jobs])
    return folder


def _settings(config: SampleConfig, dtype: str) -> dict[str, str]:
    """What all pictures of a job depend on, with a place for the concepts of each."""
    base = Path(config.pretrained_model_name_or_path)
    facts = {
        "base_model": config.pretrained_model_name_or_path,
        "base_files": hash_listing(base) if base.exists() else config.revision,
        "variant": config.variant,
        "dtype": dtype,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "concepts": None,
        "negative_prompt": config.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": float(config.guidance_scale),
        "height": config.height,
        "width": config.width,
    }
    return {key: "" if value is None else str(value) for key, value in facts.items()}


def _schedulers(config: SampleConfig, pipe: Any, lines: "Sequence[Line]") -> "dict[Line, Any]":
    """The scheduler of each line: as the config says or else as its concepts were trained, the base's own if that fits.

    Raises:
        UserError: the base can have no such scheduler, or concepts of one prompt need different ones.
    """
    from atomdiff.sampling.batching import schedules

    asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
    advice = "draw them by themselves, or choose for all with prediction_type and rescale_betas_zero_snr"
    made, chosen = {str(schedule_settings(pipe.scheduler)): pipe.scheduler}, {}
    for line in lines:
        try:
            wanted = common_scheduler(schedules(line.concepts), pipe.scheduler, asked, advice)
        except UserError as error:
            raise UserError(f"the prompt {line.prompt!r}: {error}") from error
        chosen[line] = made.setdefault(str(schedule_settings(wanted)), wanted)
    return chosen


def _tell_schedulers(base: Any, schedulers: "dict[Line, Any]") -> None:
    """Print which concepts are drawn by another scheduler than the base's, or than was right for their training."""
    from atomdiff.sampling.batching import schedules

    told: dict[str, list[str]] = {}
    for line, scheduler in schedulers.items():
        worn: list[tuple[str, ScheduleConfig | None]] = [*schedules(line.concepts)] or [("the base", None)]
        for name, schedule in worn:
            facts = [f"drawn by {describe_scheduler(scheduler)}"]
            facts += [] if scheduler is base else [f"the base has {describe_scheduler(base)}"]
            facts += [] if schedule is None else _trained_for(schedule, base, scheduler)
            if len(facts) > 1:
                told.setdefault("; ".join(facts), []).append(name)
    for said, names in told.items():
        print(f"{list_some(list(dict.fromkeys(names)))}: {said}")


def _trained_for(schedule: ScheduleConfig, base: Any, scheduler: Any) -> list[str]:
    """What to say where a concept is not drawn as it was trained."""
    try:
        own = fitting_scheduler(schedule, base)
    except UserError as error:
        return [f"trained with one that the base cannot have ({error})"]
    return [] if schedule_settings(own) == schedule_settings(scheduler) else [f"trained for {describe_scheduler(own)}"]


def _draw(
    config: SampleConfig, pipe: Any, jobs: "Sequence[tuple[PictureFile, Line]]", schedulers: "dict[Line, Any]"
) -> Iterator[tuple[PictureFile, Image.Image | None]]:
    """Yield pictures as their batches are drawn; those of one scheduler share batches."""
    from atomdiff.sampling.adapter_cache import Wardrobe
    from atomdiff.sampling.batching import pack

    wardrobe = Wardrobe(pipe)
    alike: dict[Any, list[tuple[PictureFile, Line]]] = {}
    for job in jobs:
        alike.setdefault(schedulers[job[1]], []).append(job)
    batches = [
        (scheduler, batch)
        for scheduler, group in alike.items()
        for batch in pack(group, itemgetter(1), config.sample_batch_size)
    ]
    for scheduler, batch in batches:
        pipe.scheduler = scheduler
        lines = [line for _, line in batch]
        with wardrobe.worn(lines):
            negative = config.negative_prompt
            images = draw_each(
                pipe,
                [wardrobe.spell(line, line.text) for line in lines],
                [picture.seed for picture, _ in batch],
                len(batch),
                shown=[picture.prompt for picture, _ in batch],
                negative_prompt=None if negative is None else [wardrobe.spell(line, negative) for line in lines],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                height=config.height,
                width=config.width,
            )
            yield from zip([picture for picture, _ in batch], images, strict=True)
