"""Options of `atomdiff evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from atomdiff.pipelines.config import BaseModelConfig, GenerationConfig, SchedulerConfig
from atomdiff.sampling.config import SampleConfig, Side
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ExistingPath, PositiveInt
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SchedulerConfig, GenerationConfig, BaseModelConfig):
    """Measure concepts: subject fidelity, prompt match, diversity, drift and prior similarity, in one table."""

    concepts: tuple[PathText, ...]
    """Concepts to measure, each by itself and named like its subject: concept or LoRA files, PEFT folders, folders of
    fully fine-tuned pipelines, folders of several of these, or user/repo on the Hub."""
    weights: tuple[float | dict[Any, Any], ...] = ()
    """Adapter weight of each concept, as for atomdiff sample. Default: 1 each."""
    reference_data_dir: ExistingPath
    """Folder with a folder of images for each subject, or with the images of the only one. Best are images that were
    not trained on: where there is a subfolder unseen, its images are taken."""
    protocol: PathText = "quick"
    """Which prompts are generated: quick (ten prompts for any subject), dreambench, dreambench_plus, toybox,
    toybox_tuning, toybox_edits (subjects of the toybox), or a YAML file."""
    encoders: tuple[str, ...] = ("facebook/dino-vits16", "openai/clip-vit-base-patch32")
    """Vision models of transformers that compare images, as folders or Hub ids; those with a text encoder (CLIP,
    SigLIP) also compare images with prompts. Or toybox: the judge of the embedded model's images."""
    class_name: str | None = None
    """Class of the subject, in the base's words. Default: as the protocol says, else the trigger phrase without its
    trigger word where the concept's file has that, else as the file says."""
    trigger_phrases: tuple[str, ...] = ()
    """What prompts call each subject, where its concept's file does not say so, such as "sks dog"."""
    output_dir: PathText = "out/evaluation"
    """Folder for the images, results.json, results.md and a contact sheet. Images that exist with the same settings are
    kept."""
    score_only: bool = False
    """Measure the images that are in output_dir and generate none, whatever base, precision and sampling settings they
    were generated with. A missing one is an error."""
    images_per_prompt: PositiveInt | None = None
    """Images for each prompt. Default: as the protocol says."""
    num_prompts: PositiveInt | None = None
    """Use only the first so many prompts. Default: all."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the base model; encoders compute in float32. Default: as for atomdiff sample."""
    height: Side | None = None
    """Height in pixels, a multiple of 8. Default: that of the base model."""
    width: Side | None = None
    """Width in pixels, a multiple of 8. Default: that of the base model."""

    def check(self) -> None:
        """Check that there is something to measure."""
        for name in ("concepts", "encoders"):
            if not getattr(self, name):
                raise UserError(f"{name}=(): expected at least one")

    def sampling(self, base: str) -> SampleConfig:
        """Return how images are sampled with the base model, or with a tuned pipeline, whose files are its own."""
        groups = (SchedulerConfig, GenerationConfig, BaseModelConfig)
        shared = {field.name for group in groups for field in fields(group)} - {"pretrained_model_name_or_path"}
        options = {name: getattr(self, name) for name in (*sorted(shared), "dtype", "height", "width")}
        if base != self.pretrained_model_name_or_path:
            options |= dict.fromkeys(("revision", "variant", "single_file_config"))
        return SampleConfig(pretrained_model_name_or_path=base, output_dir=self.output_dir, **options)
