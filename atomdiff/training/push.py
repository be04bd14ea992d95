"""Pushing the result of a run to the Hub."""

from pathlib import Path

from peft import PeftConfig

from atomdiff.concepts.push import check_upload, push_to_hub
from atomdiff.training.config import TrainConfig
from atomdiff.training.contact_sheet import row_files
from atomdiff.utils.errors import UserError


def choose_repository(config: TrainConfig, adapter: PeftConfig | None) -> str:
    """Return the repository that the concept will be pushed to.

    Raises:
        UserError: It could not be pushed: it would be a whole pipeline, or nobody is logged in.
    """
    if adapter is None:
        raise UserError("push_to_hub=True: a fully tuned pipeline is pushed by hand, with its own push_to_hub")
    return check_upload(config.repository, config.hub_token)


def push_concept(config: TrainConfig, path: Path, step: int, repo_id: str) -> str:
    """Push the concept, saved of `step`, with that step's row of the contact sheet, if any, and return where to.

    Raises:
        UserError: It could not be pushed; the message says where it is saved.
    """
    # without validation, a row that is there is of an earlier run
    images = row_files(Path(config.output_dir), step) if config.validation_steps else []
    try:
        return push_to_hub(
            path,
            repo_id,
            private=config.hub_private_repo or None,
            token=config.hub_token,
            images=dict(zip(images, config.filled_validation_prompts, strict=False)),
            base_model=config.pretrained_model_name_or_path,
            trigger_phrase=config.trigger_phrase,
        )
    except UserError as error:
        raise UserError(f"{path} is saved, but: {error}; then atomdiff.push_to_hub({str(path)!r}, ...)") from error
