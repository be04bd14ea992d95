"""A request in the engine: what its caller waits for, and the order in which jobs get their steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from atomdiff.sampling.prompt_requests import PromptRequest
from atomdiff.serving.denoising import Denoising, Geometry
from atomdiff.serving.image_request import ImageRequest


@dataclass(eq=False)
class Job:
    """One image that the engine was asked for."""

    request: ImageRequest
    """As the caller asked."""
    prompt: PromptRequest
    """Its prompt with the contents of its concepts, as they were when it came."""
    geometry: Geometry
    """Its size."""
    scheduler: Any
    """The scheduler that its own is made like."""
    expires: float
    """When it is given up, by `time.monotonic`."""
    future: Future[Tensor] = field(default_factory=Future)
    """Gives the image (3, h, w) from 0 to 1; cancel it to withdraw the request."""
    due: float = 0.0
    """Its place in the order: how much work the engine will have done when it should be done."""
    denoising: Denoising | None = None
    """Its state, once it has begun."""

    @property
    def work(self) -> float:
        """How much work it is: pixels that the denoiser is called for."""
        geometry = self.geometry
        return self.request.num_inference_steps * geometry.height * geometry.width * (1 + geometry.guided)

    @property
    def progress(self) -> float:
        """Share of its denoising steps that are done, for display."""
        if self.denoising is None:
            return 0.0
        return 1.0 if self.denoising.is_finished else self.denoising.progress

    def fail(self, error: Exception) -> bool:
        """Give an error in place of an image, and return whether the job was not done or withdrawn before."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)
            return True
        return False

    @property
    def company(self) -> tuple[Any, ...]:
        """What jobs of one call have in common: the geometry, and adapters other than atoms, which act on all rows."""
        is_atoms = all(concept.is_atoms for concept, _ in self.prompt.concepts)
        return self.geometry, None if is_atoms else self.prompt.concepts_json


def choose_batch(jobs: Sequence[Job], max_pixels: int) -> list[Job]:
    """Choose the jobs that take the next step together: the one that is due first, and those that can go with it.

    A job is due when the engine has done some multiple of its own work since it came. So short jobs overtake long ones,
    also in the middle of them; and long ones are not overtaken for ever.

    Args:
        jobs: all jobs.
        max_pixels: of all images together, unless one alone has more.
    """
    ordered = sorted(jobs, key=lambda job: job.due)
    batch: list[Job] = []
    pixels = 0
    for job in ordered:
        size = job.geometry.height * job.geometry.width
        if job.company == ordered[0].company and (not batch or pixels + size <= max_pixels):
            batch.append(job)
            pixels += size
    return batch
