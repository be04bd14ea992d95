"""Continuous batching: requests with their own concepts, steps and guidance share the calls of the denoiser."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from atomdiff.bases.find import denoiser_of, find_base
from atomdiff.concepts.compatibility import check_base
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.pipelines.scheduler import ScheduleConfig, common_scheduler
from atomdiff.sampling.concept_source import schedules
from atomdiff.sampling.generate import image_size
from atomdiff.sampling.prompt_requests import PromptRequest, read_requests
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.serving.denoising import Geometry
from atomdiff.serving.errors import EngineClosedError
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.job import Job, choose_batch
from atomdiff.serving.job_queue import EngineStats, JobQueue
from atomdiff.serving.schedulers import check_scheduler, named_scheduler
from atomdiff.serving.worker import Worker
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name

MAX_CONCEPTS = 32  # of one image: all are loaded at once, whatever else stays loaded


class Engine:
    """Generates images for many callers; methods may be called in any thread.

    One thread does all the work (`Worker`): again and again it chooses a batch of jobs (`choose_batch`) and takes one
    step of each in one call of the denoiser, at timesteps, with guidance and with concepts of their own. A job begins,
    pauses and ends between two steps. Its image is the one that its request alone would give, up to rounding. A job
    keeps the concepts that it began with, also where their files are replaced or deleted meanwhile.

    Args:
        pipe: a pipeline without concepts, which belongs to the engine from now on.
        concepts: where concepts come from; None: there are none.
        max_batch: images of the base's own size that share a call; what bounds the memory.
        max_queue: images that may wait beside them.
        timeout: seconds that a request may take, with its time in the queue.
        max_side: largest height and width, in pixels.

    Raises:
        UserError: the base is not of Stable Diffusion, or distilled to take guidance as an input.
    """

    def __init__(
        self,
        pipe: Any,
        concepts: ServedConcepts | None = None,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        timeout: float = 600.0,
        max_side: int = 1024,
    ) -> None:
        base = find_base(pipe.components)
        if base.denoiser != "unet":
            raise UserError(f"found a {type(pipe).__name__}; expected a pipeline of Stable Diffusion 1.x, 2.x or XL")
        if denoiser_of(pipe).config.time_cond_proj_dim is not None:
            raise UserError("this base is distilled to take guidance as an input: serve its original")
        self.pipe, self.concepts = pipe, concepts
        self.max_batch, self.timeout, self.max_side = max_batch, timeout, max_side
        self.native_size = base.native_size(pipe) or (512, 512)
        self.stats = EngineStats()
        self._queue = JobQueue(max_batch, max_queue, timeout, self.stats)
        self._worker = Worker(pipe, self.stats)
        self._thread = threading.Thread(target=self._run, name="atomdiff-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[ImageRequest], timeout: float | None = None) -> list[Job]:
        """Take requests, all or none; each job's future gives the image, or the error.

        Args:
            requests: one an image.
            timeout: seconds that they may take, at most those of the engine.

        Raises:
            UserError: a request cannot be fulfilled: concepts or size do not fit, or rows of the scheduler cannot be at
            different steps.
            QueueFullError: there are too many requests.
            EngineClosedError: the engine is being stopped.
        """
        expires = time.monotonic() + min(timeout or math.inf, self.timeout)
        jobs = [self._read(request, expires) for request in requests]
        self._queue.add(jobs)
        return jobs

    def check_concept(self, concept: ConceptFile) -> None:
        """Check that a concept fits the base.

        Raises:
            UserError: it does not.
        """
        with locked(self.pipe):
            check_base(concept, pipeline_models(self.pipe))

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(job.denoising is None for job in self._queue.unfinished())

    @property
    def num_running(self) -> int:
        """Jobs that have begun."""
        return sum(job.denoising is not None for job in self._queue.unfinished())

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._queue.is_closed

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those that were taken, and stop.

        Args:
            timeout: seconds to wait for them; those that are not done fail with `EngineClosedError`. None: as long as
                they take.
        """
        self._queue.close()
        self._thread.join(timeout)
        for job in self._queue.unfinished():
            job.fail(EngineClosedError("the server was stopped before the image was done; send the request again"))
        self._thread.join()

    def _read(self, request: ImageRequest, expires: float) -> Job:
        """Check a request, and find all that it needs."""
        height, width = image_size(self.pipe, request.height, request.width)
        height, width = height or self.native_size[0], width or self.native_size[1]
        if max(height, width) > self.max_side:
            raise UserError(
                f"found {width}x{height} pixels; this server makes images of at most {self.max_side} a side"
            )
        prompt = self._read_prompt(request)
        scheduler = common_scheduler(schedules(prompt.concepts), self.pipe.scheduler, ScheduleConfig())
        if request.scheduler is not None:
            scheduler = named_scheduler(request.scheduler, scheduler)
        geometry = Geometry(height, width, request.guidance_scale > 1)
        return Job(request, prompt, geometry, check_scheduler(scheduler), expires)

    def _read_prompt(self, request: ImageRequest) -> PromptRequest:
        if request.negative_prompt and split_tags(request.negative_prompt)[1]:
            found = f"negative_prompt={request.negative_prompt!r}"
            raise UserError(f"{found}: only prompts take concept tags; remove the tag")
        named = {normalize_name(name): weight for name, weight in request.concepts.items()}
        weights = {**named, **split_tags(request.prompt)[1]}
        if not weights:
            return PromptRequest(request.prompt, request.prompt)
        if self.concepts is None:
            raise UserError(f"found the concepts {', '.join(weights)}, but there is no library of concepts here")
        if len(weights) > MAX_CONCEPTS:
            raise UserError(f"found {len(weights)} concepts for one image; expected at most {MAX_CONCEPTS}")
        concepts = self.concepts.find(weights)
        return read_requests([request.prompt], concepts)[0]

    @torch.no_grad()
    def _run(self) -> None:
        """Work until the queue is closed and empty; what the engine's thread does."""
        try:
            while jobs := self._queue.wait():
                started = time.perf_counter()
                batch = self._worker.work(choose_batch(jobs, self.max_batch * math.prod(self.native_size)))
                if batch:
                    self._queue.note(batch, time.perf_counter() - started)
            self._worker.leave()
        except BaseException as error:
            self._queue.close()
            for job in self._queue.unfinished():
                self._worker.give_up(
                    job, EngineClosedError(f"the engine has stopped by an error of its own: {error!r}")
                )
            raise
