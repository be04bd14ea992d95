"""Images of the page: prompts and seeds become files that say how they were made."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.library_index import ConceptInfo
from atomdiff.pipelines.open import open_base
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.pipelines.scheduler import ScheduleConfig
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.concept_source import ConceptSource, library_source
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import describe_blacked_out
from atomdiff.sampling.prompt_requests import PromptRequest, read_requests
from atomdiff.sampling.sample import generate_samples, image_settings, make_sample
from atomdiff.sampling.schedulers import choose_schedulers
from atomdiff.utils.errors import UserError
from atomdiff.utils.precision import choose_precision, compute_device


@dataclass(frozen=True)
class ImageRequest:
    """One image that is asked for."""

    prompt: str
    """Prompt, with tags such as `<atoms:NAME:0.8>` for concepts of the library."""
    seed: int = 0
    """Seed of the noise."""


class ImageMaker(Protocol):
    """What makes images: a pipeline, or an engine that others use at the same time."""

    def make(self, requests: Sequence[ImageRequest], config: SampleConfig) -> Iterator[tuple[ImageRequest, Path]]:
        """Yield each image that was asked for with its PNG, which says how it was made; in any order.

        Args:
            requests: the images.
            config: what they have in common: base, steps, guidance, size, negative prompt; and the folder of the files.

        Raises:
            UserError: a prompt, a concept or the base cannot be used.
        """
        ...


class PipelineImages:
    """Makes images with a pipeline of its own, which is opened for the first one; in any thread, one after another.

    Args:
        library: where concepts come from.
    """

    def __init__(self, library: ConceptLibrary) -> None:
        self._library = library
        self._sources: dict[ConceptInfo, ConceptSource] = {}
        self._cache: AdapterCache | None = None
        self._scheduler: Any = None
        self._lock = threading.Lock()

    def make(self, requests: Sequence[ImageRequest], config: SampleConfig) -> Iterator[tuple[ImageRequest, Path]]:
        """Yield each image with its PNG; see `ImageMaker`."""
        with self._lock:
            read = {prompt: self._read(prompt) for prompt in dict.fromkeys(request.prompt for request in requests)}
            cache, settings, folder = self._open(config), image_settings(config), Path(config.output_dir)
            samples = [make_sample(folder, read[each.prompt], each.seed, settings) for each in requests]
            by_path = {sample.file.path: request for sample, request in zip(samples, requests, strict=True)}
            asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
            schedulers = choose_schedulers(self._scheduler, list(read.values()), asked)
            for file, image in generate_samples(config, cache, samples, schedulers):
                if image is None:
                    raise UserError(
                        f"{describe_blacked_out([(file.prompt, file.seed)])}; change the prompt or the seed"
                    )
                file.save(image)
                yield by_path[file.path], file.path

    def _open(self, config: SampleConfig) -> AdapterCache:
        if self._cache is None:
            device = compute_device()
            pipe = open_base(config, choose_precision(config.dtype, device, field="dtype").dtype).to(device)
            self._cache, self._scheduler = AdapterCache(pipe), pipe.scheduler
        return self._cache

    def _read(self, prompt: str) -> PromptRequest:
        concepts = [(self._source(name), weight) for name, weight in split_tags(prompt)[1].items()]
        return read_requests([prompt], concepts)[0]

    def _source(self, name: str) -> ConceptSource:
        """Return the source of a concept; always the same one while its file stays, so that it stays loaded."""
        info = self._library.info(name)
        if info not in self._sources:
            self._sources[info] = library_source(self._library, name)
        return self._sources[info]
