"""Find concepts on this disk, or download them from the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of httpx, or of its successor
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.concepts.peft_folder import LEARNED_EMBEDS_NAME
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some
from atomdiff.utils.versions import atomdiff_version

PathLike = str | os.PathLike[str]

_CONFIG, _WEIGHTS, _WORDS = map(re.escape, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, LEARNED_EMBEDS_NAME))
_ADAPTER_FILE = re.compile(rf"(\w+/)?({_CONFIG}|{_WEIGHTS})|{_WORDS}")
_ADAPTER_SIGN = re.compile(rf"((unet|transformer|text_encoder\w*)/)?{_CONFIG}|{_WORDS}")
_EXPECTED = f"one *{CONCEPT_SUFFIX} or LoRA file, or {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}"
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN or pass token"


def locate(
    source: PathLike,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    choice: str = "choose one by weight_name",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> tuple[Path, str]:
    """Find a concept on this disk or, for a string such as "user/repo" that is no path here, on the Hub.

    Only safetensors and JSON files are ever downloaded.

    Args:
        source: a concept file, a folder, or the name of a repository.
        weight_name: the concept file where there are several; `adapter_model.safetensors` is a PEFT adapter.
        subfolder: folder of the concept within the folder or repository.
        choice: what to do where there are several concepts, for the message.
        revision: branch, tag or commit of the repository.
        token: access token; None: the one logged in with.
        cache_dir: folder for downloads; None: the Hub client's cache.
        local_files_only: use earlier downloads only, without network.
        force_download: download again what was downloaded before.

    Returns:
        The concept's file, or the folder of a PEFT adapter, and its name.

    Raises:
        UserError: no concept or several are found, or the Hub does not answer or refuses.
    """
    if os.path.exists(source):  # false for names that no file can have
        return _locate_on_disk(Path(source), weight_name, subfolder, choice)
    if not isinstance(source, str) or not names_repository(source):
        raise UserError(f"there is no file or directory {str(source)!r}: check the path")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = f", folder {subfolder}," if subfolder else ""
    with explained(f"there is no file or directory {source!r}, and it cannot be fetched from the Hub", source):
        api = HfApi(token=token, library_name="atomdiff", library_version=atomdiff_version())
        options: dict[str, Any] = {"repo_id": source, "revision": revision, "cache_dir": cache_dir}
        listed = None if local_files_only else _listing(api, source, revision)
        if listed is None:
            snapshot = Path(api.snapshot_download(**options, local_files_only=True, allow_patterns=[]))
            names = files_in(snapshot / prefix)
            chosen = _choose(names, weight_name, f"what was downloaded of {source}{inside}", choice)
        else:
            names = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
            chosen = _choose(names, weight_name, f"the repository {source}{inside}", choice)
        fetched = api.snapshot_download(
            **options,
            allow_patterns=[glob.escape(prefix + name) for name in ([chosen] if chosen else adapter_files(names))],
            local_files_only=listed is None,
            force_download=force_download,
        )
    return Path(fetched, prefix, chosen), chosen or (subfolder or source).strip("/").rpartition("/")[2]


def concepts_in(source: str) -> list[str]:
    """Return the paths of the concepts in a folder of several, sorted; else what is given, which is one by itself.

    These are its concept files and LoRA files, and its subfolders that are PEFT adapters or pipelines.
    """
    folder = Path(source)
    if not folder.is_dir() or _is_concept(folder):
        return [source]
    visible = [each for each in sorted(folder.iterdir()) if not each.name.startswith(".")]
    found = [each for each in visible if (_is_concept(each) if each.is_dir() else each.suffix == ".safetensors")]
    if not found or (len(found) == 1 and found[0].is_file()):
        return [source]
    return [str(each) for each in found]


def _is_concept(folder: Path) -> bool:
    names = files_in(folder)
    return "model_index.json" in names or any(_ADAPTER_SIGN.fullmatch(name) for name in names)


def _locate_on_disk(path: Path, weight_name: str | None, subfolder: str | None, choice: str) -> tuple[Path, str]:
    """Find a concept at a path that is there."""
    if not path.is_file():
        folder = path / (subfolder or "")
        chosen = _choose(files_in(folder), weight_name, str(folder), choice)
        return folder / chosen, chosen or os.path.basename(os.path.abspath(folder))
    if weight_name not in (None, path.name):
        raise UserError(f"{path} is a file, but weight_name={weight_name!r} names one in a folder: leave it out")
    if path.name == SAFETENSORS_WEIGHTS_NAME and path.with_name(CONFIG_NAME).is_file():
        path = Path(os.path.abspath(path)).parent  # its settings lie beside it
    return path, path.name


def names_repository(name: str) -> bool:
    """Tell whether a string can be "user/repo" on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.endswith(".safetensors")


def files_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder and in its direct subfolders."""
    patterns = ("*", "*/*") if os.path.isdir(folder) else ()
    found = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in found)


def adapter_files(names: Iterable[str]) -> list[str]:
    """Return those of a folder's files that belong to a PEFT adapter or its token embeddings."""
    return [name for name in names if _ADAPTER_FILE.fullmatch(name)]


def _choose(names: Sequence[str], weight_name: str | None, where: str, choice: str) -> str:
    """Return the concept file among a folder's files, or "" if the folder is a PEFT adapter."""
    found = [name for name in names if name.endswith(CONCEPT_SUFFIX) and "/" not in name]
    if any(_ADAPTER_SIGN.fullmatch(name) for name in names):
        found.append(SAFETENSORS_WEIGHTS_NAME)
    if not found:  # LoRA files of other programs have any name
        found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if weight_name is None:
        if len(found) > 1:
            raise UserError(f"{where} holds {len(found)} concepts: {choice}: {', '.join(found)}")
        if not found:
            raise UserError(f"{where} holds no concept: found {list_some(names) or 'nothing'}; expected {_EXPECTED}")
        weight_name = found[0]
    elif not weight_name.endswith(".safetensors"):
        raise UserError(f"weight_name={weight_name!r}: only safetensors files are loaded; expected {_EXPECTED}")
    elif weight_name not in found and weight_name not in names:
        raise UserError(f"{where} has no {weight_name!r}; the concepts there: {', '.join(found) or 'none'}")
    return "" if weight_name == SAFETENSORS_WEIGHTS_NAME else weight_name


def _listing(api: HfApi, repo_id: str, revision: str | None) -> list[str] | None:
    """Return the names of a repository's files; None where the Hub does not answer and the cache has to do."""
    try:
        return [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or []]
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return None


@contextmanager
def explained(failed: str, repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into a UserError that says what failed, why, and what to do."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last of the transfer itself
        raise UserError(f"{failed}: {_reason(error, repo_id)}") from error


def _reason(error: Exception, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    message = " ".join(str(getattr(error, "server_message", None) or error).split())
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated; ask for access at {constants.ENDPOINT}/{repo_id}, then {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no repository {repo_id}, or a private one; check the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision; expected a branch, tag or commit of {constants.ENDPOINT}/{repo_id}"
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in; {_LOG_IN}, with one that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids access to the Hub; unset it"
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub was not asked or does not answer, and an earlier download is not in the cache; go online once"
    if status == 401:
        return f"the Hub does not accept the token; {_LOG_IN}"
    if status == 403:
        return f"the token may not do that ({message}); expected one that may write there"
    if status is None and isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({message}); check the connection"
    return message
