"""The config of a personalization run, made of groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.training.config.data import DataConfig, PreservationConfig
from atomdiff.training.config.memory import MemoryConfig
from atomdiff.training.config.objective import ObjectiveConfig
from atomdiff.training.config.optimization import OptimizationConfig
from atomdiff.training.config.output import HubConfig, OutputConfig, check_repositories, repository_name
from atomdiff.training.config.prompt import PromptConfig, check_prompt
from atomdiff.training.config.run import RunConfig
from atomdiff.training.config.subject import Subject
from atomdiff.training.config.together import TogetherConfig
from atomdiff.training.config.warm_start import WarmStartConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_with_overrides
from atomdiff.utils.paths import PathText, path_fields


@dataclass(frozen=True, kw_only=True)
class TrainingBaseConfig(BaseModelConfig):
    """VAE of the base model."""

    pretrained_vae_model_name_or_path: PathText | None = None
    """Another VAE: a folder, a Hub id or a single checkpoint file. Default: the base model's own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(  # the fields of the last come first in --help
    HubConfig,
    OutputConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PreservationConfig,
    DataConfig,
    TogetherConfig,
    PromptConfig,
    WarmStartConfig,
    RunConfig,
    TrainingBaseConfig,
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
    def validation_loss_interval(self) -> int:
        """Steps between measurements of the validation loss; 0 for none."""
        if self.validation_loss_steps is not None:
            return self.validation_loss_steps
        # a measurement takes about as long as the training of 20 images
        trained = self.max_train_steps * self.instance_images_per_step(processes=1)
        return math.ceil(self.max_train_steps / min(max(trained // 400, 2), 8))

    @property
    def filled_validation_prompts(self) -> list[str]:
        """The prompts of a row of the contact sheet: those of the config, for each subject."""
        return [subject.fill(prompt) for subject in self.subjects for prompt in self.validation_prompts]

    @property
    def repository(self) -> str:
        """The repository that the run is pushed to: user/repo, or repo for one of your own."""
        return self.hub_model_id or repository_name(self.name)

    def runs(self) -> tuple[TrainConfig, ...]:
        """Return the runs that this config stands for: itself, or one for each subject."""
        if self.concepts_list is None or self.one_file:
            return (self,)
        return tuple(
            replace(self, concepts_list=None, subjects_per_batch=1, **self._of_subject(subject))
            for subject in self.subjects
        )

    def _of_subject(self, subject: Subject) -> dict[str, Any]:
        """Return the fields of a subject's run that differ; it must not overwrite what another one writes."""
        repository = self.hub_model_id and f"{self.hub_model_id}-{repository_name(subject.name)}"
        return asdict(subject) | {"output_dir": str(Path(self.output_dir) / subject.name), "hub_model_id": repository}

    def snapshot(self) -> dict[str, Any]:
        """Return the fields that the trained parameters depend on, ready for JSON, without paths."""
        hidden = {field.name for group in (OutputConfig, HubConfig, TogetherConfig) for field in fields(group)}
        hidden.update(path_fields(type(self)))
        if self.init_from is None:
            hidden.update(field.name for field in fields(WarmStartConfig))
        rates = self.learning_rates
        resolved = {
            "learning_rate": rates["adapter"],
            "token_learning_rate": rates.get("token"),
            "text_encoder_lr": rates["text_encoder"],
        }
        subjects = self.subjects if self.concepts_list is not None else ()
        listed = {"subjects": [_without(asdict(subject), hidden) for subject in subjects]} if subjects else {}
        return _without(asdict(self), hidden) | resolved | listed

    def check(self) -> None:
        """Check what concerns several groups."""
        for subject in self.subjects:
            if self.with_prior_preservation:
                check_prompt("class_prompt", subject.class_prompt, subject)
            if self.preservation == "class" and not subject.class_name:
                expected = "what the images show, in one word such as mug, or preservation='blank'"
                raise UserError(f"class_name={subject.class_name!r}, preservation='class': expected {expected}")
            if self.validation_steps:
                check_prompt("validation_prompts", " ".join(self.validation_prompts), subject)
            if self.validation_split and subject.validation_data_dir:
                found = f"validation_split={self.validation_split}, validation_data_dir={subject.validation_data_dir!r}"
                raise UserError(f"{found}: expected one of them")
        if self.subjects_per_batch > 1 and (self.concepts_list is None or self.one_file):
            expected = "expected several subjects in a concepts_list, without one_file"
            raise UserError(f"subjects_per_batch={self.subjects_per_batch}: {expected}")
        held_out = self.validation_split or any(subject.validation_data_dir for subject in self.subjects)
        if held_out and self.validation_loss_steps == 0:
            raise UserError("validation_loss_steps=0: expected more than 0 where images are held out for it")
        if self.keep_best and not held_out:
            raise UserError("keep_best=True: expected held-out images; set validation_split 0.2 or validation_data_dir")
        if self.preservation == "blank" and self.caption_dropout:
            found = f"preservation='blank', caption_dropout={self.caption_dropout}"
            raise UserError(f"{found}: expected one of them: the empty prompt cannot both stay and show the subject")
        if self.push_to_hub:
            check_repositories([(run.name, run.repository) for run in self.runs()], self.concepts_list)


def _without(fields: dict[str, Any], hidden: set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in hidden}


def load_config(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Read a run's config from a command line, by default this process's; see `parse_with_overrides`."""
    return parse_with_overrides(TrainConfig, arguments, prog=prog)
