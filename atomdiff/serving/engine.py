"""Continuous batching: requests with their own concepts, steps and guidance share the calls of the denoiser."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atomdiff.bases.find import denoiser_of, find_base
from atomdiff.concepts.compatibility import check_base
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.pipelines.scheduler import ScheduleConfig, common_scheduler
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.concept_source import schedules
from atomdiff.sampling.generate import image_size
from atomdiff.sampling.prompt_requests import PromptRequest, read_requests
from atomdiff.serving.concepts import ServedConcepts
from atomdiff.serving.denoising import Denoising, Geometry, decode, encode, predict
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.job import Job, choose_batch
from atomdiff.serving.schedulers import check_scheduler, named_scheduler
from atomdiff.utils.errors import UserError

MAX_LOADED = 64  # concepts that stay loaded in the pipeline


class QueueFullError(Exception):
    """There are as many requests as the engine takes; `retry_after` seconds later there should be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(Exception):
    """The engine takes no more requests, as it is being stopped."""


class RequestTimeoutError(Exception):
    """A request was not done in time."""


@dataclass
class EngineStats:
    """What an engine has done so far."""

    finished: int = 0
    """Images."""
    failed: int = 0
    """Requests that could not be fulfilled."""
    cancelled: int = 0
    """Requests that were withdrawn."""
    timed_out: int = 0
    """Requests that were not done in time."""
    calls: int = 0
    """Calls of the denoiser."""
    steps: int = 0
    """Denoising steps of images; divided by `calls` it is the mean batch size."""


class Engine:
    """Generates images for many callers; methods may be called in any thread.

    One thread does all the work: again and again it chooses a batch of jobs (`choose_batch`) and takes one step of each
    in one call of the denoiser, at timesteps, with guidance and with concepts of their own. A job begins, pauses and
    ends between two steps. Its image is the one that its request alone would give, up to rounding. A job keeps the
    concepts that it began with, also where their files are replaced or deleted meanwhile.

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
        self.max_batch, self.max_queue, self.timeout, self.max_side = max_batch, max_queue, timeout, max_side
        self.native_size = base.native_size(pipe) or (512, 512)
        self.stats = EngineStats()
        self._cache = AdapterCache(pipe, MAX_LOADED)
        self._applied: tuple[list[Any], bool] | None = None  # what the open block below applies
        self._open = ExitStack()
        self._merged_last: Any = None
        self._jobs: list[Job] = []
        self._work_done = 0.0
        self._seconds_per_work = 0.0
        self._closing = False
        self._changed = threading.Condition()  # of the four above
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
        with self._changed:
            if self._closing:
                raise EngineClosedError("the server is being stopped; send the request to another, or again later")
            limit, unfinished = self.max_batch + self.max_queue, sum(not job.future.done() for job in self._jobs)
            if len(jobs) > limit:
                raise UserError(f"found {len(jobs)} images in one request; expected at most {limit}: split it")
            if unfinished + len(jobs) > limit:
                found = f"{unfinished} images are running or waiting, of {limit} that may"
                retry_after = self._seconds_until(unfinished + len(jobs) - limit)
                raise QueueFullError(f"{found}; try again in {retry_after} s", retry_after)
            for job in jobs:
                job.due = self._work_done + self.max_batch * job.work
            self._jobs += jobs
            self._changed.notify_all()
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
        return sum(job.denoising is None for job in self._unfinished())

    @property
    def num_running(self) -> int:
        """Jobs that have begun."""
        return sum(job.denoising is not None for job in self._unfinished())

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those that were taken, and stop.

        Args:
            timeout: seconds to wait for them; those that are not done fail with `EngineClosedError`. None: as long as
                they take.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        for job in self._unfinished():
            _fail(job, EngineClosedError("the server was stopped before the image was done; send the request again"))
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
        weights = {**request.concepts, **split_tags(request.prompt)[1]}
        if not weights:
            return PromptRequest(request.prompt, request.prompt)
        if self.concepts is None:
            raise UserError(f"found the concepts {', '.join(weights)}, but there is no library of concepts here")
        concepts = self.concepts.find(weights)
        return read_requests([request.prompt], concepts)[0]

    def _seconds_until(self, places: int) -> int:
        """Estimate when so many jobs will be done; called with the lock."""
        left = sorted(job.work * (1 - job.progress) for job in self._jobs)
        return min(max(math.ceil(sum(left[:places]) * self._seconds_per_work), 1), math.ceil(self.timeout))

    def _unfinished(self) -> list[Job]:
        with self._changed:
            return [job for job in self._jobs if not job.future.done()]

    # From here on: what the engine's thread does.

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self._work_until_closed()
        except BaseException as error:
            with self._changed:
                self._closing = True
            for job in self._unfinished():
                self._give_up(job, EngineClosedError(f"the engine has stopped by an error of its own: {error!r}"))
            raise

    def _work_until_closed(self) -> None:
        while True:
            with self._changed:
                while not (jobs := self._remove_ended()) and not self._closing:
                    self._changed.wait()
            if not jobs:
                break
            started, batch = time.perf_counter(), choose_batch(jobs, self.max_batch * math.prod(self.native_size))
            new = [job for job in batch if job.denoising is None]
            for has_negative in (False, True):
                self._begin([job for job in new if (job.request.negative_prompt is not None) == has_negative])
            batch = [job for job in batch if job.denoising is not None]
            if batch:
                self._step(batch)
                self._note(batch, time.perf_counter() - started)
        self._leave()

    def _remove_ended(self) -> list[Job]:
        """Forget jobs that are done or withdrawn, give up those whose time is over, and return the others."""
        now = time.monotonic()
        for job in self._jobs:
            if not job.future.done() and job.expires < now:
                state = "in the queue" if job.denoising is None else f"after {job.progress:.0%} of its steps"
                if _fail(job, RequestTimeoutError(f"the image was not done in time and was given up {state}")):
                    self.stats.timed_out += 1
        self.stats.cancelled += sum(job.future.cancelled() for job in self._jobs)
        self._jobs = [job for job in self._jobs if not job.future.done()]
        return list(self._jobs)

    def _note(self, batch: Sequence[Job], seconds: float) -> None:
        work = sum(job.work / job.request.num_inference_steps for job in batch)
        self.stats.calls += 1
        self.stats.steps += len(batch)
        with self._changed:
            self._work_done += work
            measured = seconds / work
            self._seconds_per_work += (measured - self._seconds_per_work) * (0.1 if self._seconds_per_work else 1)

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Encode the prompts of jobs together, so that they can take steps; one that cannot begin fails alone."""
        if not jobs:
            return
        try:
            self._apply(jobs, encoding=True)
            prompts = [self._cache.replace_trigger_words(job.prompt, job.prompt.text) for job in jobs]
            negatives = [job.request.negative_prompt for job in jobs]
            replaced = [
                text and self._cache.replace_trigger_words(job.prompt, text)
                for job, text in zip(jobs, negatives, strict=True)
            ]
            embeds = encode(self.pipe, prompts, replaced, jobs[0].geometry.guided)
            begun = [
                Denoising(
                    self.pipe,
                    job.scheduler,
                    each,
                    job.request.seed,
                    job.request.num_inference_steps,
                    job.request.guidance_scale,
                    job.geometry,
                )
                for job, each in zip(jobs, embeds, strict=True)
            ]
        except Exception as error:
            self._leave()
            if len(jobs) == 1:
                self._give_up(jobs[0], error)
            else:
                for job in jobs:
                    self._begin([job])
            return
        for job, denoising in zip(jobs, begun, strict=True):
            job.denoising = denoising

    def _step(self, batch: Sequence[Job]) -> None:
        """Take a step of each job; one that cannot be taken fails alone."""
        rows = [job.denoising for job in batch if job.denoising is not None]
        try:
            self._apply(batch)
            predictions = predict(self.pipe, rows)
        except Exception as error:
            self._leave()
            if len(batch) == 1:
                self._give_up(batch[0], error)
                return
            middle = len(batch) // 2  # memory may do for half of them, or one may be to blame
            self._step(batch[:middle])
            self._step(batch[middle:])
            return
        for job, row, prediction in zip(batch, rows, predictions, strict=True):
            try:
                row.advance(prediction)
                if row.is_finished:
                    self._leave()
                    self._finish(job, row.latents)
            except Exception as error:
                self._give_up(job, error)

    def _finish(self, job: Job, latents: Tensor) -> None:
        image, is_flagged = decode(self.pipe, latents)
        if is_flagged:
            raise UserError("the safety checker of the base blacked the image out; change the prompt or the seed")
        if not (image.isfinite().all() and image.any()):
            raise UserError(
                "the image is black or has values that are not finite: lower the weights of the concepts or the "
                "guidance scale"
            )
        with suppress(InvalidStateError):  # withdrawn in this moment
            job.future.set_result(image)
            self.stats.finished += 1

    def _give_up(self, job: Job, error: Exception) -> None:
        if _fail(job, error):
            self.stats.failed += 1

    def _apply(self, batch: Sequence[Job], encoding: bool = False) -> None:
        """Let the concepts of jobs act on the rows of the next call; nothing is done where they do already.

        Concepts are written into the weights where all rows have the same for a second time.
        """
        progress = [0.0 if encoding or job.denoising is None else job.denoising.progress for job in batch]
        wanted = [
            [(concept, weight if encoding else weight.at_step(share)) for concept, weight in job.prompt.concepts]
            for job, share in zip(batch, progress, strict=True)
        ]
        are_equal = all(each == wanted[0] for each in wanted)
        can_mix = batch[0].company[1] is None
        merge = not can_mix or (not encoding and are_equal and wanted[0] == self._merged_last)
        if not encoding:
            self._merged_last = wanted[0] if are_equal else None
        if self._applied == (wanted, merge):
            return
        self._leave()
        prompts = [job.prompt for job in batch]
        self._open.enter_context(self._cache.use(prompts, progress=None if encoding else progress, merge=merge))
        self._applied = wanted, merge

    def _leave(self) -> None:
        """End what `_apply` has begun."""
        self._applied = None
        self._open.close()


def _fail(job: Job, error: Exception) -> bool:
    """Let a job fail, and return whether it was not done or withdrawn before."""
    with suppress(InvalidStateError):
        job.future.set_exception(error)
        return True
    return False
