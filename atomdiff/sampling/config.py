"""Options of `atomdiff sample`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.config import BaseModelConfig, GenerationConfig, SchedulerConfig
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, ExistingPath, Range
from atomdiff.utils.paths import PathText
from atomdiff.utils.text_files import read_text

SIZE_MULTIPLE = 8  # pixels; every pipeline of Stable Diffusion needs it
_SEEDS = 2**64  # of PyTorch's generators

Side = Annotated[int, Range(SIZE_MULTIPLE, 8192)]


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig(ConfigGroup):
    """Concepts."""

    concepts: tuple[PathText, ...]
    """Concepts: concept or LoRA files, PEFT folders, or user/repo on the Hub."""
    weights: tuple[float | dict[Any, Any], ...] = ()
    """Adapter weight of each concept: a number, 1 is as trained; or JSON with factors by block and, for images, by
    denoising progress, and the share of the concept that is kept: '{"weight": 0.8, "blocks": {"down": 0.5, "up.1": 0},
    "steps": {"0": 1, "1": 0.2}, "keep": 0.5}'. Default: 1 each."""
    trigger_words: tuple[str, ...] = ()
    """New trigger word for each concept, where two have the same one. Default: their own."""

    def check(self) -> None:
        """Check that there is a weight and a trigger word for each concept, or none."""
        command_line_weights(self.concepts, self.weights, self.trigger_words)


@dataclass(frozen=True)
class SampleConfig(SchedulerConfig, GenerationConfig, ConceptsConfig, BaseModelConfig):
    """Generate images for every prompt and seed, with any number of concepts."""

    pretrained_model_name_or_path: PathText
    """Base model, or a fully fine-tuned pipeline: a folder, a Hub id, or a checkpoint file (.safetensors, .ckpt)."""
    output_dir: PathText = "out/samples"
    """Folder for the images, grid.png and manifest.json. Images that exist with the same settings are skipped."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base model. Default: the mixed precision that accelerate is configured with, else bfloat16 where
    the hardware has instructions for it, else float32."""

    concepts: tuple[PathText, ...] = field(default=(), kw_only=True)
    """Concepts for all prompts: concept or LoRA files, PEFT folders, or user/repo on the Hub. Default: the base model
    alone."""
    library: ExistingPath | None = None
    """Folder of concept files for tags in prompts: "a photo of sks mug <atoms:NAME:0.8>" uses NAME.atoms.safetensors of
    this folder with weight 0.8 (or JSON as for weights; 1 if left out). A prompt may have several tags. A tag with the
    name of one of --concepts sets its weight for that prompt."""

    prompts: tuple[str, ...] = ()
    """Prompts."""
    prompts_file: ExistingPath | None = None
    """Text file with more prompts, one per line; blank lines and lines that start with "# " are skipped."""
    negative_prompt: str | None = None
    """Negative prompt."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every prompt is generated once with each."""
    height: Side | None = None
    """Height in pixels, a multiple of 8. Default: that of the base model."""
    width: Side | None = None
    """Width in pixels, a multiple of 8. Default: that of the base model."""

    def check(self) -> None:
        """Check the prompts, the size and the seeds."""
        for prompt in self.prompts:
            split_tags(prompt)
        if self.negative_prompt and split_tags(self.negative_prompt)[1]:
            raise UserError(f"negative_prompt={self.negative_prompt!r}: only prompts take concept tags; remove the tag")
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % SIZE_MULTIPLE:
                raise UserError(f"{name}={getattr(self, name)}: expected a multiple of {SIZE_MULTIPLE}")
        if not self.seeds or not 0 <= min(self.seeds) <= max(self.seeds) < _SEEDS:
            raise UserError(f"seeds={list(self.seeds)}: expected whole numbers from 0 to 2^64 - 1, at least one")

    def read_prompts(self) -> list[str]:
        """Return the prompts of `prompts` and `prompts_file` in order, without repeats.

        Raises:
            UserError: there is none, or the file is not text.
        """
        lines = list(self.prompts)
        if self.prompts_file is not None:
            text = read_text(self.prompts_file).split("\n")
            lines += [line for line in text if not f"{line.strip()} ".startswith("# ")]
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise UserError("found no prompt; give --prompts, or --prompts_file with one per line")
        return prompts
