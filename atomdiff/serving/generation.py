"""From requests over HTTP to PNG images: wait for the engine, and give up where the client has left."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping, Sequence

from fastapi import Request
from PIL.PngImagePlugin import PngInfo
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from atomdiff.sampling.generate import to_pil
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.job import Job
from atomdiff.serving.metrics import Metrics

_LOOK_SECONDS = 0.2  # between looks whether the client is still there


class ClientLeftError(Exception):
    """The client has closed the connection; nobody reads the answer."""


async def generate_png(
    http: Request, requests: Sequence[ImageRequest], texts: Sequence[Mapping[str, str]] | None = None
) -> list[bytes]:
    """Generate the images of one HTTP request, and return them as PNG files.

    Args:
        http: the HTTP request.
        requests: one an image.
        texts: what each file says of its image besides, by keyword.

    Raises:
        UserError: a request cannot be fulfilled.
        ClientLeftError: the client has left; the images are withdrawn.
    """
    engine, metrics = http.app.state.engine, http.app.state.metrics
    started = time.monotonic()
    jobs = await run_in_threadpool(engine.submit, requests)
    waiting = [asyncio.wrap_future(job.future) for job in jobs]
    try:
        while not all(future.done() for future in waiting):
            done, _ = await asyncio.wait(waiting, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            if any(future.exception() for future in done if not future.cancelled()):
                break
            if await http.is_disconnected():
                raise ClientLeftError("the client has left")
        if any(future.cancelled() for future in waiting):
            raise ClientLeftError("the images were withdrawn before they were done")
        images = [await future for future in waiting]
    finally:
        for future in waiting:  # those that are done stay as they are
            future.cancel()
    _observe(metrics, requests, time.monotonic() - started)
    more = texts or [{}] * len(jobs)
    return [await run_in_threadpool(_png, *each) for each in zip(images, jobs, more, strict=True)]


def _observe(metrics: Metrics, requests: Sequence[ImageRequest], seconds: float) -> None:
    metrics.latency.observe(seconds)
    metrics.images.inc(len(requests))


def _png(image: Tensor, job: Job, more: Mapping[str, str]) -> bytes:
    """Return an image (3, h, w) from 0 to 1 as a PNG file that says how it was made."""
    text = PngInfo()
    for name in ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler"):
        value = getattr(job.request, name)
        text.add_itxt(name, "" if value is None else str(value))
    for name, value in {"concepts": job.prompt.concepts_json, **more}.items():
        text.add_itxt(name, value)
    file = io.BytesIO()
    to_pil(image).save(file, "PNG", pnginfo=text)
    return file.getvalue()
