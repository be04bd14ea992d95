"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from atomdiff.serving.engine import Engine

_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """What happens in a server; the engine's own figures are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.latency = Histogram(
            "atomdiff_request_seconds",
            "Time of finished requests, with the queue.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("atomdiff_images", "Images that were sent.", registry=self.registry)
        self.answers = Counter("atomdiff_errors", "Requests that were refused.", ["status"], registry=self.registry)
        self._engine = engine
        self.registry.register(self)  # type: ignore[arg-type]  # it has the one method that is called

    def count_refusal(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self.answers.labels(str(status)).inc()

    def collect(self) -> Iterator[Any]:
        """Yield the engine's figures."""
        engine, stats = self._engine, self._engine.stats
        yield GaugeMetricFamily("atomdiff_running", "Images that have begun.", engine.num_running)
        yield GaugeMetricFamily("atomdiff_waiting", "Images that have not begun.", engine.num_waiting)
        yield GaugeMetricFamily("atomdiff_max_batch", "Images that can be denoised together.", engine.max_batch)
        yield CounterMetricFamily("atomdiff_denoiser_calls", "Calls of the denoiser.", stats.calls)
        yield CounterMetricFamily("atomdiff_denoising_steps", "Denoising steps of images.", stats.steps)
        jobs = CounterMetricFamily("atomdiff_jobs", "Images that are done with, by how they ended.", labels=["end"])
        for end in ("finished", "failed", "cancelled", "timed_out"):
            jobs.add_metric([end], getattr(stats, end))
        yield jobs

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)
