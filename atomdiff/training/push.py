"""What a run shows of its concept, and the repository that it is pushed to."""

from pathlib import Path

from peft import PeftConfig

from atomdiff.concepts.push import check_upload, push_to_hub
from atomdiff.training.config import TrainConfig
from atomdiff.training.config.prompt import PromptConfig
from atomdiff.utils.errors import UserError


def trigger_phrase(config: PromptConfig) -> str:
    """Return what to write in prompts: word and class of every subject."""
    return ", ".join(subject.phrase for subject in config.subjects)


def validation_prompts(config: TrainConfig) -> list[str]:
    """Return the prompts of the contact sheet: those of the config, for each subject."""
    return [subject.fill(prompt) for subject in config.subjects for prompt in config.validation_prompts]


def row_of(config: TrainConfig, step: int) -> list[Path]:
    """Return the pictures of a row of the contact sheet that are there."""
    return sorted(Path(config.output_dir).glob(f"validation/step-{step:06d}-*.png"))


def choose_repository(config: TrainConfig, adapter: PeftConfig | None) -> str:
    """Return the repository that the concept will be pushed to.

    Raises:
        UserError: It could not be pushed: it would be a whole pipeline, or nobody is logged in.
    """
    if adapter is None:
        raise UserError("push_to_hub=True: a fully tuned pipeline is pushed by hand, with its own push_to_hub")
    return check_upload(config.repository, config.hub_token)


def push_concept(config: TrainConfig, place: Path, repo_id: str) -> str:
    """Push the concept with the last row of the contact sheet and return where to.

    Raises:
        UserError: It could not be pushed; the message says where it is saved.
    """
    row = row_of(config, config.max_train_steps) if config.validation_steps else []  # or they are of an earlier run
    try:
        return push_to_hub(
            place,
            repo_id,
            private=config.hub_private_repo or None,
            token=config.hub_token,
            pictures=dict(zip(row, validation_prompts(config), strict=False)),
            base_model=config.pretrained_model_name_or_path,
            trigger_phrase=trigger_phrase(config),
        )
    except UserError as error:
        raise UserError(f"{place} is saved, but: {error}; then atomdiff.push_to_hub({str(place)!r}, ...)") from error
