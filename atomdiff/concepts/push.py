"""Push concepts to the Hugging Face Hub: write the repository's folder, then upload it in one commit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of httpx, or of its successor
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from atomdiff.concepts.example_images import ExampleImages, find_examples, open_without_metadata
from atomdiff.concepts.hub import PathLike, explained, files_in, locate
from atomdiff.concepts.model_card import metric_rows, summarize_adapter, summarize_file, write_card
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import check_empty
from atomdiff.utils.versions import atomdiff_version

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CardOptions(TypedDict, total=False):
    """What the model card of a concept says and shows."""

    images: ExampleImages | None
    """Example images: files, folders of `atomdiff sample`, or a mapping from file to prompt. None: images in the
    concept's folder that were generated with it, and the contact sheet."""
    metrics: Mapping[str, Any] | None
    """Further rows of the card's table. None: those of the report.json in the concept's folder."""
    license: str | None
    """The Hub's name of a license, such as cc-by-4.0."""
    base_model: str | None
    """Hub id of the base; None: the concept's base, if it looks like a Hub id."""
    trigger_phrase: str | None
    """What to write in a prompt; None: the concept's own."""
    tags: Sequence[str]
    """Further tags of the card."""


def push_to_hub(
    path: PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a concept of atomdiff",
    create_pr: bool = False,
    model_card: bool = True,
    **card: Unpack[CardOptions],
) -> str:
    """Upload a concept, its model card and example images to the Hub, in one commit.

    `atomdiff.concepts.push.write_repository` writes what would be uploaded to a folder.

    Args:
        path: a concept file, a folder with one, such as a run's output, or the folder of a PEFT adapter.
        repo_id: "user/repo", or "repo" for one of your own; created if it does not exist.
        private: create a new repository as private; None: the account's default.
        token: access token that may write; None: the one logged in with.
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.
        model_card: replace README.md; False: leave it as it is.
        **card: what the model card says and shows: `images`, `metrics`, `license`, `base_model`, `trigger_phrase` and
            `tags`, see `atomdiff.concepts.push.CardOptions`.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        UserError: the concept or an image cannot be read, nobody is logged in, or the Hub refuses.
    """
    with TemporaryDirectory() as folder:
        full_id = check_upload(repo_id, token) if "/" not in repo_id else repo_id
        write_repository(folder, path, full_id, **card)
        with explained(f"cannot push to {full_id}", full_id):
            if token is False or (not isinstance(token, str) and get_token() is None):
                raise LocalTokenNotFoundError
            api = HfApi(token=token, library_name="atomdiff", library_version=atomdiff_version())
            url = api.create_repo(full_id, private=private, exist_ok=True)
            names = [name for name in files_in(Path(folder)) if model_card or name != "README.md"]
            # not upload_folder, which may make several commits, and pull requests that are drafts
            added = [CommitOperationAdd(name, Path(folder, name)) for name in names]
            commit = api.create_commit(full_id, added, commit_message=commit_message, create_pr=create_pr)
    return str(commit.pr_url or url)


def write_repository(folder: PathLike, path: PathLike, repo_id: str, **card: Unpack[CardOptions]) -> Path:
    """Write the folder that `push_to_hub` uploads: the concept, `images/` and the model card, README.md.

    Images are stored without the metadata of their files. Training images are never included unasked.

    Args:
        folder: an empty or missing folder.
        path: as for `push_to_hub`.
        repo_id: the repository's full name, for the card.
        **card: as for `push_to_hub`.

    Returns:
        `folder`.

    Raises:
        UserError: the folder is not empty, or the concept or an image cannot be read; nothing is written.
        TypeError: there is no such option of the card.
    """
    if unknown := card.keys() - CardOptions.__annotations__.keys():
        raise TypeError(f"there is no option {min(unknown)}: expected {', '.join(CardOptions.__annotations__)}")
    folder = Path(folder)
    check_empty(folder, "folder")
    located, title = locate(Path(path), choice="give the path of one")
    concept = summarize_file(located) if located.is_file() else summarize_adapter(located, title)
    concept = replace(
        concept,
        base_model=card.get("base_model") or concept.base_model,
        trigger_phrase=card.get("trigger_phrase") or concept.trigger_phrase,
        rows={**concept.rows, **metric_rows(card.get("metrics"), concept)},
    )
    examples = {
        f"images/{number:02d}-{_slug(file.stem)}.png": (open_without_metadata(file), prompt)
        for number, (file, prompt) in enumerate(find_examples(card.get("images"), concept.path))
    }
    prompts = {name: prompt for name, (_, prompt) in examples.items()}
    readme = write_card(concept, repo_id, prompts, card.get("license"), card.get("tags", ()))
    with new_folder(folder) as unfinished:
        for name, file in concept.files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, unfinished / name)
        for name, (image, _) in examples.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            image.save(unfinished / name, format="png")
        (unfinished / "README.md").write_text(readme, encoding="utf-8")
    return folder


def check_upload(repo_id: str, token: str | bool | None = None) -> str:
    """Check early that a push can succeed, by asking the Hub who is logged in.

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


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80] or "image"
