"""Concepts pushed to the Hugging Face Hub: a repository's folder is written, then uploaded in one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of httpx, or of its successor
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from atomdiff.concepts.hub import PathLike, Pictures, explained, files_in
from atomdiff.concepts.model_card import write_repository
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version


def push_to_hub(
    path: PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a concept of atomdiff",
    create_pr: bool = False,
    model_card: bool = True,
    pictures: Pictures | None = None,
    figures: Mapping[str, Any] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    trigger_phrase: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Upload a concept, its model card and example pictures to the Hub, in one commit.

    `atomdiff.concepts.model_card.write_repository` takes the same arguments and shows beforehand what will be uploaded.

    Args:
        path: a concept file, a folder with one of these, such as a run's output, or a PEFT adapter's directory.
        repo_id: "user/repo", or "repo" for one of your own; made if it does not exist.
        private: make a new repository private; None: as the account makes them.
        token: access token that may write; None: the one logged in with.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.
        model_card: write README.md, in place of the one there; False: leave it as it is.
        pictures: see `write_repository`.
        figures: see `write_repository`.
        license: see `write_repository`.
        base_model: see `write_repository`.
        trigger_phrase: see `write_repository`.
        tags: see `write_repository`.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        UserError: the concept or a picture cannot be read, nobody is logged in, or the Hub refuses.
    """
    with TemporaryDirectory() as folder:
        full_id = check_upload(repo_id, token) if "/" not in repo_id else repo_id
        write_repository(
            folder,
            path,
            full_id,
            pictures=pictures,
            figures=figures,
            license=license,
            base_model=base_model,
            trigger_phrase=trigger_phrase,
            tags=tags,
        )
        with explained(f"cannot push to {full_id}", full_id):
            if token is False or (not isinstance(token, str) and get_token() is None):
                raise LocalTokenNotFoundError
            api = HfApi(token=token, library_name="atomdiff", library_version=atomdiff_version())
            url = api.create_repo(full_id, private=private, exist_ok=True)
            names = [name for name in files_in(Path(folder)) if model_card or name != "README.md"]
            added = [CommitOperationAdd(name, Path(folder, name)) for name in names]
            done = api.create_commit(full_id, added, commit_message=commit_message, create_pr=create_pr)
    return str(done.pr_url or url)


def check_upload(repo_id: str, token: str | bool | None = None) -> str:
    """Ask the Hub who is logged in, so that a push that cannot succeed is refused early; nothing is changed.

    Returns:
        The repository's full name, "user/repo".

    Raises:
        UserError: the name cannot be one, nobody is logged in, the token may only read, or the Hub does not answer.
    """
    with explained(f"cannot push to {repo_id}", repo_id):
        validate_repo_id(repo_id)
        user = HfApi(token=token).whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"cannot push to {repo_id}: the token may only read; make one that may write")
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
