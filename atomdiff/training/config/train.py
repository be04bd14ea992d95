"""The config of a personalization run, made of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from atomdiff.training.config.data import ClassImagesConfig, DataConfig
from atomdiff.training.config.memory import MemoryConfig
from atomdiff.training.config.objective import ObjectiveConfig
from atomdiff.training.config.optimizer import OptimizerConfig
from atomdiff.training.config.output import HubConfig, OutputConfig, check_repositories, repository_name
from atomdiff.training.config.prompt import PromptConfig, check_prompt
from atomdiff.training.config.run import RunConfig
from atomdiff.training.config.subject import Subject
from atomdiff.utils.options import parse_with_overrides
from atomdiff.utils.paths import PathText, path_fields


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig(RunConfig):
    """Files of the base model."""

    variant: str | None = None
    """Variant of the base model's weight files, such as fp16."""
    single_file_config: PathText | None = None
    """Folder or Hub id of a pipeline whose configs describe the single checkpoint file. Default: diffusers' guess from
    the weights, fetched from the Hub; it takes every SD 2.x for 2.1 with v-prediction."""
    pretrained_vae_model_name_or_path: PathText | None = None
    """Another VAE: a folder, a Hub id or a single checkpoint file. Default: the base model's own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(  # the fields of the last come first in --help
    HubConfig,
    OutputConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ClassImagesConfig,
    DataConfig,
    PromptConfig,
    BaseModelConfig,
):
    """Train a concept: personalize Stable Diffusion on a few images of a subject.

    Fields known from diffusers' DreamBooth scripts mean the same here.
    """

    @property
    def cache_folder(self) -> Path:
        """Where latents and prompt embeddings are cached for later runs."""
        return Path(self.cache_dir or Path(self.output_dir) / "cache")

    def class_folder(self, subject: Subject) -> Path:
        """Where the class images of a subject are."""
        if subject.class_data_dir:
            return Path(subject.fill(subject.class_data_dir))
        return Path(self.output_dir) / "class_images" / (subject.name if len(self.subjects) > 1 else "")

    @property
    def token_steps(self) -> int:
        """The number of steps in which token embeddings are trained."""
        return round(self.train_text_encoder_ti_frac * self.max_train_steps)

    @property
    def repository(self) -> str:
        """The repository that the run is pushed to: user/repo, or repo for one of your own."""
        return self.hub_model_id or repository_name(self.name)

    def runs(self) -> tuple[TrainConfig, ...]:
        """Return the runs that this config stands for: itself, or one for each subject."""
        if self.concepts_list is None or self.one_file:
            return (self,)
        return tuple(replace(self, concepts_list=None, **self._of_subject(subject)) for subject in self.subjects)

    def _of_subject(self, subject: Subject) -> dict[str, Any]:
        """Return the fields of a subject's run that differ; it must not overwrite what another one writes."""
        repository = self.hub_model_id and f"{self.hub_model_id}-{repository_name(subject.name)}"
        return asdict(subject) | {"output_dir": str(Path(self.output_dir) / subject.name), "hub_model_id": repository}

    def snapshot(self) -> dict[str, Any]:
        """Return the fields that the trained parameters depend on, ready for JSON, without paths."""
        aside = {field.name for group in (OutputConfig, HubConfig) for field in fields(group)}
        left_out = aside.union(path_fields(type(self)))
        snapshot = {name: value for name, value in asdict(self).items() if name not in left_out}
        snapshot["learning_rate"] = self.learning_rates["adapter"]
        snapshot["token_learning_rate"] = self.learning_rates["token"]
        snapshot["text_encoder_lr"] = self.learning_rates["text_encoder"]
        if self.concepts_list is not None:
            snapshot["subjects"] = [
                {name: value for name, value in asdict(subject).items() if name not in left_out}
                for subject in self.subjects
            ]
        return snapshot

    def check(self) -> None:
        """Check what concerns several groups."""
        for subject in self.subjects:
            if self.with_prior_preservation:
                check_prompt("class_prompt", subject.class_prompt, subject)
            if self.validation_steps:
                check_prompt("validation_prompts", " ".join(self.validation_prompts), subject)
        if self.push_to_hub:
            check_repositories([(run.name, run.repository) for run in self.runs()], self.concepts_list)


def load_config(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Read a run's config from a command line; see `parse_with_overrides`.

    Args:
        arguments: The command line without the program's name, by default this process's.
        prog: The program's name in messages.

    Raises:
        UserError: A field has a value that cannot be used.
    """
    return parse_with_overrides(TrainConfig, arguments, prog=prog)
