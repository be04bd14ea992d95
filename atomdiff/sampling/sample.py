"""`atomdiff sample`: prompts x seeds x concepts -> image files; a stopped job continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.open import open_base
from atomdiff.pipelines.scheduler import ScheduleConfig
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.batching import Sample, make_batches, shard, sort_by_concepts
from atomdiff.sampling.concept_source import open_sources
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import describe_blacked_out, generate_each
from atomdiff.sampling.output_files import SampleFile, refuse_foreign_images, write_overview
from atomdiff.sampling.prompt_requests import PromptRequest, read_requests, warn_about_prompts
from atomdiff.sampling.schedulers import choose_schedulers, print_schedulers
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_listing
from atomdiff.utils.paths import check_writable, refuse_overlap
from atomdiff.utils.precision import choose_precision, compute_device, log_precision
from atomdiff.utils.progress import ProgressBar


def save_samples(config: SampleConfig) -> Path:
    """Generate the missing images of `config.output_dir`; write a labeled grid and a JSON manifest of all in it.

    Every PNG carries its prompt, seed, concepts and settings as text. An undamaged one with the same text is kept, so
    that a stopped job continues. Under `accelerate launch` the processes share the work.

    Returns:
        The folder.

    Raises:
        UserError: a prompt, the base or a concept is missing or cannot be used, the concepts of a prompt need different
            schedulers, or an image is not finite, black or blacked out; such an image is not saved.
    """
    from accelerate import Accelerator

    concepts = open_sources(config.concepts, config.weights, config.trigger_words)
    library = None if config.library is None else ConceptLibrary(config.library)
    requests = read_requests(config.read_prompts(), concepts, library)
    folder = Path(config.output_dir)
    sources = {f"the concept {concept.file}": concept.path for request in requests for concept, _ in request.concepts}
    refuse_overlap({"output_dir": folder}, {"the base": config.pretrained_model_name_or_path, **sources})
    refuse_foreign_images(folder)
    check_writable(folder, f"output_dir={config.output_dir!r}")
    settings = image_settings(config)
    samples = [
        make_sample(folder, request, seed, settings) for request in requests for seed in dict.fromkeys(config.seeds)
    ]
    state = Accelerator(cpu=not torch.accelerator.is_available())
    save_missing(config, samples, state)
    if state.is_main_process:
        write_overview(folder, [sample.file for sample in samples])
    return folder


def make_sample(folder: Path, request: PromptRequest, seed: int, settings: dict[str, str]) -> Sample:
    """Return the image of a prompt and a seed in a folder, made with `image_settings`."""
    return Sample(SampleFile(folder, request.prompt, seed, settings | {"concepts": request.concepts_json}), request)


def save_missing(config: SampleConfig, samples: Sequence[Sample], state: Any, *, check_safety: bool = True) -> None:
    """Generate and save those of the images that are not saved yet.

    Args:
        config: how they are generated; not which ones.
        samples: the images.
        state: accelerate's, of the processes that share them.
        check_safety: use the base's safety checker, if it has one.

    Raises:
        UserError: as for `save_samples`.
    """
    from accelerate.utils import gather_object

    missing = sort_by_concepts([sample for sample in samples if not sample.file.is_saved()])
    state.wait_for_everyone()  # all processes have seen the same files missing
    blacked_out = _save_share(config, missing, state, check_safety) if missing else []
    state.wait_for_everyone()
    if blacked_out := gather_object(blacked_out):
        message = describe_blacked_out(blacked_out)
        raise UserError(f"{message}; the others are saved: change these prompts or seeds")


def image_settings(config: SampleConfig) -> dict[str, str]:
    """Return the settings that the images depend on, as PNG text; `concepts` is filled in for each image."""
    base = Path(config.pretrained_model_name_or_path)
    dtype = choose_precision(config.dtype, compute_device(), field="dtype").dtype
    values = {
        "base_model": config.pretrained_model_name_or_path,
        "base_files": hash_listing(base) if base.exists() else config.revision,
        "variant": config.variant,
        "single_file_config": config.single_file_config,
        "dtype": str(dtype).removeprefix("torch."),
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "concepts": None,
        "negative_prompt": config.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": float(config.guidance_scale),
        "height": config.height,
        "width": config.width,
    }
    return {key: "" if value is None else str(value) for key, value in values.items()}


def _save_share(
    config: SampleConfig, missing: Sequence[Sample], state: Any, check_safety: bool
) -> list[tuple[str, int]]:
    """Generate and save this process's share; return prompts and seeds of images that were blacked out."""
    share = shard(missing, state.process_index, state.num_processes)
    if not share:
        return []
    precision = choose_precision(config.dtype, compute_device(), field="dtype")
    pipe = open_base(config, precision.dtype).to(state.device)
    if not check_safety and hasattr(pipe, "safety_checker"):
        pipe.safety_checker = None
    requests = list(dict.fromkeys(sample.request for sample in missing))
    asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
    schedulers = choose_schedulers(pipe.scheduler, requests, asked)
    log_precision(precision, state.device)
    if state.is_main_process:
        warn_about_prompts(pipe, requests)
        print_schedulers(pipe.scheduler, schedulers)
    images = generate_samples(config, AdapterCache(pipe), share, schedulers)
    blacked_out = []
    for file, image in ProgressBar(images, "generating", len(share), unit="images", disable=not state.is_main_process):
        if image is None:
            blacked_out.append((file.prompt, file.seed))
        else:
            file.save(image)
    return blacked_out


def generate_samples(
    config: SampleConfig, cache: AdapterCache, samples: Sequence[Sample], schedulers: Mapping[PromptRequest, Any]
) -> Iterator[tuple[SampleFile, Image.Image | None]]:
    """Yield the images batch by batch; None for one that the safety checker blacked out.

    Args:
        config: how they are generated; not which ones.
        cache: the pipeline with concepts that are loaded already; its scheduler is set to that of the last images.
        samples: the images.
        schedulers: request -> scheduler; the images of a batch have one.

    Raises:
        UserError: a concept cannot be loaded, or an image is black or not finite.
    """
    pipe, negative = cache.pipe, config.negative_prompt
    by_scheduler: dict[Any, list[Sample]] = {}
    for sample in samples:
        by_scheduler.setdefault(schedulers[sample.request], []).append(sample)
    for scheduler, group in by_scheduler.items():
        pipe.scheduler = scheduler
        for batch in make_batches(group, config.sample_batch_size):
            files, requests = [sample.file for sample in batch], [sample.request for sample in batch]
            with cache.use(requests):
                images = generate_each(
                    pipe,
                    [cache.replace_trigger_words(request, request.text) for request in requests],
                    [file.seed for file in files],
                    len(batch),
                    original_prompts=[file.prompt for file in files],
                    negative_prompt=negative and [cache.replace_trigger_words(each, negative) for each in requests],
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    height=config.height,
                    width=config.width,
                )
                yield from zip(files, images, strict=True)
