"""What the thread of an engine does with jobs: encode their prompts, denoise a step of each, decode their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from atomdiff.bases.find import find_base
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.serving.denoising import Denoising, decode, encode, predict
from atomdiff.serving.job import Job
from atomdiff.serving.job_queue import EngineStats
from atomdiff.utils.errors import UserError

MAX_LOADED = 64  # concepts that stay loaded in the pipeline


class Worker:
    """Takes steps of jobs, in one thread.

    What fails for several jobs together is tried again with each half of them: memory may do for these, or one job may
    be to blame, which then fails alone.

    Args:
        pipe: a pipeline without concepts.
        stats: counts what is done.
    """

    def __init__(self, pipe: Any, stats: EngineStats) -> None:
        self._pipe, self._stats = pipe, stats
        self._cache = AdapterCache(pipe, MAX_LOADED)
        self._denoiser = find_base(pipe.components).denoiser
        self._encoders = [name for name in pipe.components if name.startswith("text_encoder")]
        self._applied: tuple[list[Any], bool] | None = None  # what the open block below applies
        self._open = ExitStack()
        self._merged_last: Any = None

    def work(self, batch: Sequence[Job]) -> list[Job]:
        """Take a step of each of some jobs that go together; new ones begin before it, finished ones are decoded.

        Returns:
            Those that began, and so took the step or failed in it.
        """
        new = [job for job in batch if job.denoising is None]
        for has_negative in (False, True):  # they are encoded together
            self._together(self._begin, [job for job in new if (job.request.negative_prompt is None) != has_negative])
        begun = [job for job in batch if job.denoising is not None]
        self._together(self._step, begun)
        return begun

    def give_up(self, job: Job, error: Exception) -> None:
        """Let a job fail, unless it is done or withdrawn."""
        if job.fail(error):
            self._stats.failed += 1

    def leave(self) -> None:
        """Let no concepts act any more, unless they are written into the weights."""
        self._applied = None
        self._open.close()

    def _together(self, act: Callable[[Sequence[Job]], None], jobs: Sequence[Job]) -> None:
        """Do something with all jobs at once; where that fails, with each half of them."""
        if not jobs:
            return
        try:
            act(jobs)
            return
        except Exception as error:
            self.leave()
            if len(jobs) == 1:
                self.give_up(jobs[0], error)
                return
        middle = len(jobs) // 2  # outside: the error would keep the memory of what failed
        self._together(act, jobs[:middle])
        self._together(act, jobs[middle:])

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Encode the prompts of jobs, all or none of them with a negative prompt."""
        self.leave()  # the rows of the next step are others
        with self._cache.use([job.prompt for job in jobs], merge=not _can_mix(jobs), components=self._encoders):
            prompts = [self._cache.replace_trigger_words(job.prompt, job.prompt.text) for job in jobs]
            negatives = [
                job.request.negative_prompt
                and self._cache.replace_trigger_words(job.prompt, job.request.negative_prompt)
                for job in jobs
            ]
            embeds = encode(self._pipe, prompts, negatives, jobs[0].geometry.guided)
        begun = [
            Denoising(self._pipe, job.scheduler, each, job.request, job.geometry)
            for job, each in zip(jobs, embeds, strict=True)
        ]
        for job, denoising in zip(jobs, begun, strict=True):
            job.denoising = denoising

    def _step(self, jobs: Sequence[Job]) -> None:
        """Take a step of each job, and decode those that it finishes."""
        rows = [job.denoising for job in jobs if job.denoising is not None]
        self._apply(jobs)
        predictions = predict(self._pipe, rows)
        self._stats.calls += 1
        self._stats.steps += len(jobs)
        for job, row, prediction in zip(jobs, rows, predictions, strict=True):
            try:
                row.advance(prediction)
            except Exception as error:
                self.give_up(job, error)
        finished = [job for job, row in zip(jobs, rows, strict=True) if row.is_finished and not job.future.done()]
        self._together(self._finish, finished)

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Decode the images of jobs, and give them to those who wait."""
        latents = torch.cat([job.denoising.latents for job in jobs if job.denoising is not None])
        for job, (image, is_flagged) in zip(jobs, decode(self._pipe, latents), strict=True):
            try:
                _check(image, is_flagged)
            except UserError as error:
                self.give_up(job, error)
                continue
            with suppress(InvalidStateError):  # withdrawn in this moment
                job.future.set_result(image)
                self._stats.finished += 1

    def _apply(self, jobs: Sequence[Job]) -> None:
        """Let the concepts of jobs act on the rows of the denoiser's next call; nothing is done where they do already.

        Concepts are written into the weights where all rows have the same for a second time.
        """
        progress = [0.0 if job.denoising is None else job.denoising.progress for job in jobs]
        wanted = [
            [(concept, weight.at_step(share)) for concept, weight in job.prompt.concepts]
            for job, share in zip(jobs, progress, strict=True)
        ]
        are_equal = all(each == wanted[0] for each in wanted)
        merge = not _can_mix(jobs) or (are_equal and wanted[0] == self._merged_last)
        self._merged_last = wanted[0] if are_equal else None
        if self._applied == (wanted, merge):
            return
        self.leave()
        prompts = [job.prompt for job in jobs]
        use = self._cache.use(prompts, progress=progress, merge=merge, components=[self._denoiser])
        self._open.enter_context(use)
        self._applied = wanted, merge


def _can_mix(jobs: Sequence[Job]) -> bool:
    """Whether each of some jobs that go together can have concepts of its own."""
    return jobs[0].company[1] is None


def _check(image: Tensor, is_flagged: bool) -> None:
    """Refuse images that nobody wants to see."""
    if is_flagged:
        raise UserError("the safety checker of the base blacked the image out; change the prompt or the seed")
    if not (image.isfinite().all() and image.any()):
        raise UserError(
            "the image is black or has values that are not finite: lower the weights of the concepts or the guidance "
            "scale"
        )
