"""Options of `atomdiff serve`, and of its replicas on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.sampling.config import Side
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import BatchSize, ExistingPath, NonNegativeFloat, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class EngineConfig(BaseModelConfig):
    """Server."""

    library: ExistingPath | None = None
    """Folder of concept files that requests may name. Default: no concepts."""
    api_key: str | None = None
    """Key that requests must carry, as "Authorization: Bearer KEY". Default: none is asked for."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base model. Default: bfloat16 where the hardware has instructions for it, else float32."""
    max_batch: BatchSize = 8
    """Images of the base's own size that are denoised together; what bounds the memory."""
    max_queue: PositiveInt = 64
    """Images that may wait; further requests are refused with status 429."""
    max_side: Side = 1024
    """Largest height and width of images, in pixels."""
    request_timeout: PositiveFloat = 600.0
    """Seconds that a request may take, with its time in the queue."""
    shutdown_timeout: PositiveFloat = 60.0
    """Seconds that running requests have to finish when the server is stopped."""
    max_upload_mb: PositiveFloat = 16.0
    """Largest concept file that may be uploaded, in megabytes."""

    def check(self) -> None:
        """Check that an API key can be sent."""
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("api_key: expected printable ASCII characters, at least one; leave it out for none")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """Serve images over HTTP, with the concepts of a library."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only; set an api_key with any other."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port; 0 takes a free one."""


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig(EngineConfig):
    """Servers on the machines of a Ray cluster, as many as the queue asks for."""

    min_replicas: PositiveInt = 1
    """Servers that are there without requests."""
    max_replicas: PositiveInt = 4
    """Most servers."""
    num_cpus: PositiveFloat = 1.0
    """CPU cores of a server, as Ray counts them."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of a server, as Ray counts them; 0 for servers on CPUs."""

    def check(self) -> None:
        """Check that there may be as many servers as there must be."""
        if self.max_replicas < self.min_replicas:
            raise UserError(f"max_replicas={self.max_replicas}: expected at least min_replicas, {self.min_replicas}")
