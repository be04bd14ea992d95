"""What a run measures and writes besides its result: checkpoints, validation, logs, and the push to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from atomdiff.training.config.run import LoggingConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, NonNegativeInt, PositiveInt
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class OutputConfig(LoggingConfig):
    """Checkpoints, validation prompts, validation loss and tracker."""

    validation_prompts: tuple[str, ...] = ("a photo of {trigger_word} {class_name}",)
    """Prompts of the validation images."""
    validation_loss_steps: NonNegativeInt | None = None
    """Steps between measurements for the report: the loss on held-out and on training images at fixed noise, and how
    far the base has drifted for other prompts; 0 for none. Default: two to eight times in a run, about a twentieth
    of its time."""
    evaluate_with: tuple[str, ...] = ()
    """Vision models of transformers that measure the result for the report, as folders or Hub ids, such as
    facebook/dino-vits16 and openai/clip-vit-base-patch32, or toybox for the embedded model: the metrics of atomdiff
    evaluate, by its protocol quick with two images a prompt. Its images are compared with the held-out ones, or without
    such with the instance images. Default: none."""
    keep_best: bool = False
    """Save the parameters of the measurement with the lowest validation loss, not those of the last step. Needs
    held-out images (validation_split or validation_data_dir), and memory for one more copy of what is trained."""
    checkpointing_steps: NonNegativeInt = 500
    """Steps between checkpoints; 0 for none."""
    checkpoints_total_limit: PositiveInt | None = None
    """Maximum number of checkpoints to keep; the oldest are deleted. Default: keep all."""
    save_steps: NonNegativeInt = 0
    """Steps between concepts that are saved on the way, in output_dir/steps, to compare them; 0 for none. None of them
    is deleted."""
    resume_from_checkpoint: PathText | None = None
    """Checkpoint folder to resume from, or "latest" for the newest one in output_dir."""
    detect_anomaly: bool = False
    """Check the output of every module and every gradient, and stop at the first that is not finite with its name and
    the images of the batch. Slower; not with fp16, where steps that overflow are done again."""
    report_to: str | None = "tensorboard"
    """Experiment tracker supported by accelerate (tensorboard, wandb, ...), or none."""
    logging_dir: PathText = "logs"
    """Folder of the tracker's files, relative to output_dir."""

    def check(self) -> None:
        """Check that there is something to validate on, and a measurement to choose the best by."""
        if self.validation_steps and not self.validation_prompts:
            raise UserError("validation_prompts=(): expected at least one prompt, or validation_steps 0")
        if self.keep_best and self.validation_loss_steps == 0:
            raise UserError("keep_best=True, validation_loss_steps=0: expected steps at which the loss is measured")


@dataclass(frozen=True, kw_only=True)
class HubConfig(ConfigGroup):
    """Push to the Hugging Face Hub."""

    push_to_hub: bool = False
    """Push the concept file to the Hugging Face Hub after training, with validation images and a model card."""
    hub_model_id: str | None = None
    """Repository to push to, as user/repo. Default: a repository of yours, named like the concept file. Each subject of
    a concepts_list has a repository of its own, user/repo-NAME, where NAME is that of its folder of images."""
    hub_token: str | None = field(default=None, repr=False)
    """Access token with write permission. Default: the token of `hf auth login`, which keeps it out of the shell
    history."""
    hub_private_repo: bool = False
    """Create the repository as a private one."""


def repository_name(folder: str) -> str:
    """Return a folder's name with "-" for what the Hub does not allow in the names of repositories."""
    name = re.sub(r"[^A-Za-z0-9_.-]+|-{2,}|\.{2,}", "-", folder)
    return re.sub(r"-{2,}", "-", name).strip("-.")


def check_repositories(repositories: Iterable[tuple[str, str]], concepts_list: str | None) -> None:
    """Check the repository of each run, by the run's name, before the first of them is trained and pushed.

    Raises:
        UserError: The Hub does not allow a name, or two runs would have the same.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    pushed: dict[str, str] = {}
    for name, repository in repositories:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            expected = "name another hub_model_id, or rename the folder"
            raise UserError(f"cannot push {name!r} to {repository!r}: {error} {expected}") from error
        other = pushed.setdefault(repository.lower(), name)
        if other != name:
            found = f"{other!r} and {name!r} would both be pushed to {repository}"
            raise UserError(f"{concepts_list}: {found}; rename one of the folders")
