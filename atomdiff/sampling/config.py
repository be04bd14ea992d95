"""Options of `atomdiff sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.prompt_syntax import split_tags
from atomdiff.pipelines.scheduler import ScheduleConfig
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.text_files import read_text

SIZE_MULTIPLE = 8  # pixels; every pipeline of Stable Diffusion needs it
_SEEDS = 2**64  # of PyTorch's generators
_RANGES = {
    "num_inference_steps": (1, 1000),
    "guidance_scale": (0, 1000),
    "height": (SIZE_MULTIPLE, 8192),
    "width": (SIZE_MULTIPLE, 8192),
    "sample_batch_size": (1, 4096),
}


@dataclass(frozen=True)
class SampleConfig:
    """Generate images for every prompt and seed, with any number of concepts.

    Raises:
        UserError: a field has a value that cannot be used.
    """

    pretrained_model_name_or_path: PathText
    """Base model, or a fully fine-tuned pipeline: a folder, a Hub id, or a checkpoint file (.safetensors, .ckpt)."""
    output_dir: PathText = "out/samples"
    """Folder for the images, grid.png and manifest.json. Images that exist with the same settings are skipped."""
    revision: str | None = None
    """Revision of a base model on the Hub."""
    variant: str | None = None
    """Variant of the base model's files, such as fp16."""
    single_file_config: PathText | None = None
    """Pipeline folder or Hub id with the configs for a base model that is a single checkpoint file. Default: detected
    by diffusers, from the Hub, which takes every 2.x for 2.1 with v-prediction."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base model. Default: the mixed precision that accelerate is configured with, else bfloat16 where
    the hardware has instructions for it, else float32."""
    prediction_type: PredictionType | None = None
    """Prediction type of the scheduler, for all images. Default: as each image's concepts were trained, else as the
    base model's scheduler config says."""
    rescale_betas_zero_snr: bool | None = None
    """Rescale the noise schedule to zero terminal SNR, for all images. Default: as for prediction_type."""

    concepts: tuple[PathText, ...] = ()
    """Concepts for all prompts: concept or LoRA files, PEFT folders, or user/repo on the Hub. Default: the base model
    alone."""
    weights: tuple[float | dict[Any, Any], ...] = ()
    """Adapter weight of each concept: a number, 1 is as trained; or JSON with factors by block and by denoising
    progress: '{"weight": 0.8, "blocks": {"down": 0.5, "up.1": 0}, "steps": {"0": 1, "1": 0.2}}'. Default: 1 each."""
    trigger_words: tuple[str, ...] = ()
    """New trigger word for each concept, where two have the same one. Default: their own."""

    library: PathText | None = None
    """Folder of concept files for tags in prompts: "a photo of sks mug <atoms:NAME:0.8>" uses NAME.atoms.safetensors of
    this folder with weight 0.8 (or JSON as for weights; 1 if left out). A prompt may have several tags. A tag with the
    name of one of --concepts sets its weight for that prompt."""

    prompts: tuple[str, ...] = ()
    """Prompts."""
    prompts_file: PathText | None = None
    """Text file with more prompts, one per line; blank lines and lines that start with "# " are skipped."""
    negative_prompt: str | None = None
    """Negative prompt."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every prompt is generated once with each."""
    num_inference_steps: int = 30
    """Number of denoising steps."""
    guidance_scale: float = 7.5
    """Scale of classifier-free guidance; 1 turns it off."""
    height: int | None = None
    """Height in pixels, a multiple of 8. Default: that of the base model."""
    width: int | None = None
    """Width in pixels, a multiple of 8. Default: that of the base model."""
    sample_batch_size: int = 4
    """Images per batch, on each process."""

    def __post_init__(self) -> None:
        expand_paths(self)
        for path in filter(None, (self.prompts_file, self.library)):
            if not Path(path).exists():
                raise UserError(f"found nothing at {path!r}: check the path")
        command_line_weights(self.concepts, self.weights, self.trigger_words)
        if self.negative_prompt and split_tags(self.negative_prompt)[1]:
            raise UserError(f"negative_prompt={self.negative_prompt!r}: only prompts take concept tags; remove the tag")
        ScheduleConfig(self.prediction_type)  # refuses what it does not know
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"{name}={value}: expected {least} to {most}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and value % SIZE_MULTIPLE:
                raise UserError(f"{name}={value}: expected a multiple of {SIZE_MULTIPLE}")
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
