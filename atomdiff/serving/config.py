"""Options of `atomdiff serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.sampling.config import Side
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import BatchSize, ExistingPath, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True)
class ServeConfig(BaseModelConfig):
    """Serve images over HTTP, with the concepts of a library."""

    library: ExistingPath | None = None
    """Folder of concept files that requests may name. Default: no concepts."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only; set an api_key with any other."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port; 0 takes a free one."""
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
