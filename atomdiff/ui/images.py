"""Images of the page: requests to an engine that all visitors share become files that say how they were made."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path

from atomdiff.pipelines.open import open_base
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import to_pil
from atomdiff.sampling.output_files import SampleFile
from atomdiff.sampling.sample import image_settings
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.serving.engine import Engine
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.job import Job
from atomdiff.ui.config import UiConfig
from atomdiff.utils.precision import choose_precision, compute_device

_MAX_QUEUE = 512  # images that may wait, of all visitors
_TIMEOUT = 86400.0  # seconds; on a CPU a large grid takes hours
_INTERVAL = 0.25  # seconds between looks at what is done


class ImageRun:
    """The images that a visitor has asked for, on their way.

    Args:
        jobs: those of the engine.
        files: where the image of each is saved.
    """

    def __init__(self, jobs: Sequence[Job], files: Sequence[SampleFile]) -> None:
        self._jobs, self._files = jobs, files
        self.saved: dict[int, Path] = {}
        """Number of the request -> PNG, of the images that are done."""

    @property
    def progress(self) -> float:
        """Share of the denoising steps that are done."""
        return sum(job.progress for job in self._jobs) / len(self._jobs)

    def watch(self) -> Iterator[None]:
        """Save images as they are done, and yield after every look, until all are done or withdrawn.

        Images that are not done when the iterator is closed are withdrawn.

        Raises:
            UserError: an image could not be made; the others are saved.
            Exception: as the engine gives it, such as `RequestTimeoutError`.
        """
        try:
            is_done = False
            while not is_done:
                is_done = all(job.future.done() for job in self._jobs)
                self._save_finished()
                yield
                wait([job.future for job in self._jobs], _INTERVAL)
        finally:
            self.cancel()
        for job in self._jobs:
            if not job.future.cancelled():
                job.future.result()  # raises its error

    def cancel(self) -> None:
        """Withdraw the images that are not done."""
        for job in self._jobs:
            job.future.cancel()

    def _save_finished(self) -> None:
        for number, (job, file) in enumerate(zip(self._jobs, self._files, strict=True)):
            future = job.future
            if number not in self.saved and future.done() and not future.cancelled() and future.exception() is None:
                file.save(to_pil(future.result()))
                self.saved[number] = file.path


class EngineImages:
    """Makes images with one engine, whose base is opened for the first of them; methods may be called in any thread.

    Args:
        config: the base and its precision, and where the files go.
        concepts: those that prompts may name.
    """

    def __init__(self, config: UiConfig, concepts: ServedConcepts) -> None:
        self._config, self._concepts = config, concepts
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the base is in memory."""
        return self._engine is not None

    def start(self, requests: Sequence[ImageRequest]) -> ImageRun:
        """Ask for images, which share the calls of the denoiser with those of others.

        Args:
            requests: of the same negative prompt, steps, guidance and scheduler.

        Raises:
            UserError: a prompt, a concept or the base cannot be used; nothing was asked for.
            QueueFullError: too many images are waiting.
        """
        jobs = self._open().submit(requests)
        folder = Path(self._config.images_folder, f"{time.strftime('%Y-%m-%d_%H%M%S')}-{secrets.token_hex(2)}")
        settings = image_settings(self._describe(requests[0], folder)) | {"scheduler": requests[0].scheduler or ""}
        files = [
            SampleFile(folder, job.request.prompt, job.request.seed, settings | {"concepts": job.prompt.concepts_json})
            for job in jobs
        ]
        return ImageRun(jobs, files)

    def close(self) -> None:
        """Withdraw what is not done, and stop the engine."""
        with self._lock:
            if self._engine is not None:
                self._engine.close(timeout=0)

    def _open(self) -> Engine:
        with self._lock:
            if self._engine is None:
                device = compute_device()
                dtype = choose_precision(self._config.dtype, device, field="dtype").dtype
                self._engine = Engine(
                    open_base(self._config, dtype).to(device),
                    self._concepts,
                    max_batch=self._config.max_batch,
                    max_queue=_MAX_QUEUE,
                    timeout=_TIMEOUT,
                )
            return self._engine

    def _describe(self, request: ImageRequest, folder: Path) -> SampleConfig:
        """Return the config of a sampling job whose images are made in the same way."""
        return SampleConfig(
            **self._config.base_options,
            dtype=self._config.dtype,
            output_dir=str(folder),
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
        )
