"""Options of `atomdiff ui`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.utils.fields import BatchSize, ExistingPath, Range
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class UiConfig(BaseModelConfig):
    """Open a page in the browser: train concepts, try prompts, keep a library."""

    library: PathText = "out/library"
    """Folder of concept files, which the page shows and to which trained concepts are added; made if missing."""
    output_dir: PathText = "out/ui"
    """Folder for training jobs, images and exports."""
    train_config: ExistingPath | None = None
    """YAML file with the training options that the page begins with. Default: configs/sdxl.yaml for SDXL, else
    configs/sd15.yaml."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base model for images. Default: bfloat16 where the hardware has instructions for it, else
    float32."""
    max_batch: BatchSize = 8
    """Images of the base's own size that are denoised together, of all who look at the page; what bounds the memory."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is this machine alone. The page has no password: whoever reaches it can train
    and delete."""
    port: Annotated[int, Range(1, 65535)] = 7860
    """Port to listen on."""

    @property
    def base_options(self) -> dict[str, Any]:
        """The options that name the base, for other commands."""
        return {field.name: getattr(self, field.name) for field in fields(BaseModelConfig)}

    @property
    def jobs_folder(self) -> Path:
        """Where training jobs are."""
        return Path(self.output_dir) / "jobs"

    @property
    def images_folder(self) -> Path:
        """Where generated images are."""
        return Path(self.output_dir) / "images"

    @property
    def exports_folder(self) -> Path:
        """Where exported concepts are."""
        return Path(self.output_dir) / "exports"

    @property
    def uploads_folder(self) -> Path:
        """Where the copies are that gradio makes of photos and images; each page has its own, which it empties."""
        return Path(self.output_dir) / "uploads"
