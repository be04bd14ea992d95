"""Concepts on the Hugging Face Hub: fetched by the name of a repository, pushed with a model card."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, constants, get_token
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
from PIL import Image, ImageOps

from atomdiff.delta_file import DeltaFile, read_delta_file, read_tensors, some, split_token_key
from atomdiff.errors import UserError
from atomdiff.model_spec import atomdiff_version
from atomdiff.peft_directory import LEARNED_EMBEDS_NAME
from atomdiff.picture_files import content_hash
from atomdiff.tuner.layer import TRAINED_KINDS

PathLike = str | os.PathLike[str]
Pictures = Sequence[PathLike] | Mapping[Any, str]  # the latter from file to prompt

CONCEPT_SUFFIX = ".atoms.safetensors"
_ADAPTER_FILE = re.compile(rf"(\w+/)?({re.escape(CONFIG_NAME)}|{re.escape(SAFETENSORS_WEIGHTS_NAME)})")
_ADAPTER_SIGN = re.compile(rf"(text_encoder\w*/)?{re.escape(CONFIG_NAME)}")
_EXPECTED = f"one *{CONCEPT_SUFFIX}, or {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}"
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN or pass token"
_MOST_FOUND = 8  # example pictures taken without being named
_TRAINING_SETTINGS = ("learning_rate", "token_learning_rate", "lr_scheduler", "train_batch_size")

_CARD = """\
---
{{ card_data }}
---

# {{ title }}

{% if gallery %}<Gallery />

{% endif -%}
A concept for {{ base_name }}, made with atomdiff: {{ method }}.
{%- if phrase %} Write `{{ phrase }}` in a prompt to get it.{% endif %}

```python
import atomdiff
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ base_code }})
atomdiff.load_atoms(pipe, {{ load_code }})
image = pipe({{ prompt_code }}).images[0]
```
{% for url in sheets %}
![pictures drawn with the concept]({{ url }})
{% endfor %}
| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
"""


def locate(
    source: PathLike,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> tuple[Path, str]:
    """Find a concept on this disk or, for a string such as "user/repo" that is no path here, on the Hub.

    Only safetensors and JSON files are ever downloaded.

    Args:
        source: a concept file, a directory, or the name of a repository.
        weight_name: the concept file to take where there are several; `adapter_model.safetensors` is a PEFT adapter.
        subfolder: folder of the concept within the directory or repository.
        revision: branch, tag or commit of the repository.
        token: access token; None: the one logged in with.
        cache_dir: where downloads are kept; None: the Hub client's cache.
        local_files_only: take what was downloaded before and ask no network.
        force_download: download again what was downloaded before.

    Returns:
        The concept's file, or its directory if it is a PEFT adapter, and the name to know it by.

    Raises:
        UserError: nothing is there, several concepts are, or the Hub does not answer or refuses.
    """
    local = Path(source)
    if local.is_file():
        if weight_name not in (None, local.name):
            raise UserError(f"{source} is a file, but weight_name={weight_name!r} names one in a folder: leave it out")
        return local, local.name
    if local.exists():
        folder = local / (subfolder or "")
        found = _files_in(folder)
        only_adapter = weight_name is None and not any(name.endswith(CONCEPT_SUFFIX) for name in found)
        chosen = "" if only_adapter else _choose(found, weight_name, str(folder))
        return folder / chosen, chosen or folder.name
    if not isinstance(source, str) or not _names_repository(source):
        raise UserError(f"there is no file or directory {str(source)!r}: check the path")
    with _explained(f"there is no file or directory {source!r}, and it cannot be fetched from the Hub", source):
        api = HfApi(token=token, library_name="atomdiff", library_version=atomdiff_version())
        place: dict[str, Any] = {"repo_id": source, "revision": revision, "cache_dir": cache_dir}
        names = None if local_files_only else _listing(api, source, revision)
        if names is None:
            names = _files_in(Path(api.snapshot_download(**place, local_files_only=True, allow_patterns=[])))
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        chosen = _choose(inside, weight_name, f"the repository {source}{f', folder {subfolder},' if subfolder else ''}")
        wanted = [chosen] if chosen else _adapter_files(inside)
        fetched = api.snapshot_download(
            **place,
            allow_patterns=[glob.escape(prefix + name) for name in wanted],
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(fetched, prefix, chosen), chosen or (subfolder or source).strip("/").rpartition("/")[2]


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

    `write_repository` takes the same arguments and shows beforehand what will be uploaded.

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
        card: dict[str, Any] = {"license": license, "base_model": base_model, "trigger_phrase": trigger_phrase}
        write_repository(folder, path, full_id, pictures=pictures, figures=figures, tags=tags, **card)
        files = {file.relative_to(folder).as_posix(): file for file in sorted(Path(folder).rglob("*"))}
        if not model_card:
            del files["README.md"]
        with _explained(f"cannot push to {full_id}", full_id):
            if token is False or (not isinstance(token, str) and get_token() is None):
                raise LocalTokenNotFoundError
            api = HfApi(token=token, library_name="atomdiff", library_version=atomdiff_version())
            url = api.create_repo(full_id, private=private, exist_ok=True)
            added = [CommitOperationAdd(name, file) for name, file in files.items() if file.is_file()]
            done = api.create_commit(full_id, added, commit_message=commit_message, create_pr=create_pr)
    return str(done.pr_url or url)


def check_upload(repo_id: str, token: str | bool | None = None) -> str:
    """Ask the Hub who is logged in, so that a push that cannot succeed is refused early; nothing is changed.

    Returns:
        The repository's full name, "user/repo".

    Raises:
        UserError: the name cannot be one, nobody is logged in, the token may only read, or the Hub does not answer.
    """
    with _explained(f"cannot push to {repo_id}", repo_id):
        validate_repo_id(repo_id)
        user = HfApi(token=token).whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"cannot push to {repo_id}: the token may only read; make one that may write")
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def write_repository(
    folder: PathLike,
    path: PathLike,
    repo_id: str,
    *,
    pictures: Pictures | None = None,
    figures: Mapping[str, Any] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    trigger_phrase: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write what `push_to_hub` uploads: the concept, `images/` and the model card, README.md.

    Pictures are stored anew, without the metadata of their files. Photos of the subject are never taken unasked.

    Args:
        folder: an empty or missing folder.
        path: a concept file, a folder with one of these, or a PEFT adapter's directory.
        repo_id: the repository's full name, for the card.
        pictures: files, or folders of `atomdiff sample` to look through; or a mapping from file to prompt. None: what
            lies beside the concept and was drawn with it: pictures of `atomdiff sample` and the contact sheet.
        figures: further rows of the card's table. None: the figures of the report.json beside the concept.
        license: the Hub's name of a licence, such as cc-by-4.0.
        base_model: Hub id of the base; None: what the concept was trained on, if that has a Hub id's form.
        trigger_phrase: what to write in a prompt; None: what the concept says.
        tags: further tags of the card.

    Returns:
        `folder`.

    Raises:
        UserError: the folder is not empty, or the concept or a picture cannot be read.
    """
    folder, path = Path(folder), Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty: name an empty or a new folder")
    if not path.exists():
        raise UserError(f"there is no file or directory {str(path)!r}: check the path")
    concept = _read(path)
    concept = replace(
        concept,
        base_model=base_model or concept.base_model,
        trigger_phrase=trigger_phrase or concept.trigger_phrase,
        facts={**concept.facts, **_figures(figures, concept)},
    )
    shown = {
        f"images/{number:02d}-{_slug(file.stem)}.png": (file, prompt)
        for number, (file, prompt) in enumerate(_example_pictures(pictures, concept))
    }
    for name, file in concept.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    for name, (file, _) in shown.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _store(file, folder / name)
    card = _model_card(concept, repo_id, {name: prompt for name, (_, prompt) in shown.items()}, license, tags)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class _Concept:
    """What a repository and its card take from a concept."""

    path: Path
    """The file, or the directory of a PEFT adapter."""
    files: dict[str, Path]
    """Name in the repository -> file."""
    title: str
    method: str
    """One clause."""
    architecture: str
    """As in modelspec; empty if unknown."""
    base_model: str
    trigger_phrase: str
    facts: dict[str, Any]
    """Rows of the card's table."""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.files.values())


def _model_card(
    concept: _Concept, repo_id: str, shown: Mapping[str, str], license: str | None, tags: Sequence[str]
) -> str:
    """README.md; `shown` has a prompt for each picture's name, or "" for a sheet."""
    base, phrase = concept.base_model, concept.trigger_phrase
    on_hub = _names_repository(base) and not Path(base).exists()
    base_link = f"[{base}]({constants.ENDPOINT}/{base})" if on_hub else f"`{Path(base).name}`"
    gallery = [{"text": prompt, "output": {"url": url}} for url, prompt in shown.items() if prompt]
    family = "stable-diffusion-xl" if "xl" in concept.architecture else "stable-diffusion"
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="atomdiff",
        license=license,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "atomdiff", *([] if concept.architecture.startswith("other") else [family]), *tags],
        instance_prompt=phrase or None,
        widget=gallery or None,
    )
    weight_name = [] if concept.path.is_dir() else [f"weight_name={json.dumps(name)}" for name in concept.files]
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=concept.title,
        gallery=gallery,
        base_name=base_link if base else "Stable Diffusion",
        method=concept.method,
        phrase=phrase,
        base_code=json.dumps(base if on_hub else f"path/to/{Path(base or 'the-base').name}"),
        load_code=", ".join([json.dumps(repo_id), *weight_name]),
        prompt_code=json.dumps(next(filter(None, shown.values()), f"a photo of {phrase or '...'}"), ensure_ascii=False),
        sheets=[url for url, prompt in shown.items() if not prompt],
        rows={_cell(name): _cell(value) for name, value in concept.facts.items()},
    )
    return str(card)


def _read(path: Path) -> _Concept:
    path, name = locate(path)
    if path.is_file():
        return _read_atoms(path, name)
    names = _files_in(path)
    files = {name: path / name for name in _adapter_files(names)}
    if not files:
        raise UserError(f"{path} holds no concept: found {some(names) or 'nothing'}; expected {_EXPECTED}")
    tensors = [read_tensors(file)[0] for name, file in files.items() if name.endswith(".safetensors")]
    words = dict.fromkeys(split_token_key(key)[0] for t in tensors for key in t if key.startswith("token."))
    settings = next((_read_settings(file) for name, file in files.items() if name.endswith(CONFIG_NAME)), {})
    kind = str(settings.get("peft_type", "a word"))
    count = sum(tensor.numel() for each in tensors for tensor in each.values())
    concept = _Concept(
        path=path,
        files=files,
        title=path.resolve().name,
        method=f"{kind}, {count:,} numbers",
        architecture="",
        base_model=str(settings.get("base_model_name_or_path") or ""),
        trigger_phrase=" ".join(words),
        facts={"method": kind, "numbers trained": count},
    )
    concept.facts["bytes"] = concept.size
    return concept


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _read_atoms(path: Path, name: str) -> _Concept:
    delta = read_delta_file(path)
    trained = [tensor for kinds in delta.layers.values() for kind, tensor in kinds.items() if kind in TRAINED_KINDS]
    vectors = [vector for of in delta.tokens.values() for vector in of.values()]
    count, size = sum(tensor.numel() for tensor in trained + vectors), path.stat().st_size
    facts = {
        "method": _method(delta),
        "numbers trained": f"{count:,}, of which {sum(v.numel() for v in vectors):,} in trigger words",
        "bytes": size,
        "training": _training(delta.training),
        "made for": ", ".join(filter(None, map(delta.modelspec.get, ("architecture", "resolution")))),
        "written": f"{delta.modelspec.get('date', '')} by atomdiff {delta.atomdiff_version}".strip(),
    }
    return _Concept(
        path=path,
        files={name: path},
        title=delta.modelspec.get("title") or name.removesuffix(CONCEPT_SUFFIX),
        method=f"[filter atoms](https://arxiv.org/abs/2403.00269), {count:,} numbers in {size:,} bytes",
        architecture=delta.modelspec.get("architecture", ""),
        base_model=delta.base_model,
        trigger_phrase=delta.trigger_phrase,
        facts={key: value for key, value in facts.items() if value},
    )


def _method(delta: DeltaFile) -> str:
    config = delta.config
    form = " taken whole" if config.joint else f", recursion {config.recursion}" if config.recursion else ""
    blocks = f"channel blocks of {config.channel_block}{form}"
    return f"filter atoms, basis {config.basis}, {blocks}, in {len(delta.layers)} layers"


def _training(training: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in training.items() if not isinstance(value, (dict, list))}
    config = training.get("config")
    if isinstance(config, dict):
        plain |= {name: config[name] for name in _TRAINING_SETTINGS if config.get(name) is not None}
    return ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in plain.items())


def _figures(figures: Mapping[str, Any] | None, concept: _Concept) -> dict[str, Any]:
    """The rows given, or those of the report beside the concept if it is about this very file."""
    if figures is None:
        try:
            figures = json.loads((concept.path.parent / "report.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(figures, dict) or figures.get("file_bytes") != concept.size:
            return {}
        figures = {k: v for k, v in figures.items() if k not in ("file_bytes", "trained_numbers", "versions")}
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        inner = {f"{name}, {key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
        rows |= {key.replace("_", " "): one for key, one in inner.items() if one is not None}
    return rows


def _example_pictures(pictures: Pictures | None, concept: _Concept) -> Iterable[tuple[Path, str]]:
    """Files and their prompts; no prompt for sheets of several pictures."""
    digest = content_hash(concept.path)
    if pictures is None:
        yield from _drawn_with(digest, concept.path.parent)
    elif isinstance(pictures, Mapping):
        yield from ((Path(file), prompt) for file, prompt in pictures.items())
    else:
        for item in [pictures] if isinstance(pictures, (str, os.PathLike)) else pictures:
            file = Path(item)
            yield from _drawn_with(digest, file) if file.is_dir() else [(file, _text(file, "prompt"))]


def _drawn_with(digest: str, folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder that say they were drawn with the concept of this hash, and the sheets of them."""
    drawn = [file for file in sorted(folder.glob("*.png")) if digest in _text(file, "concepts")]
    grid, manifest, sheet = (folder / name for name in ("grid.png", "manifest.json", "contact_sheet.png"))
    ours = manifest.is_file() and digest.encode() in manifest.read_bytes()
    sheets = [(file, "") for file in [grid] * ours + [sheet] if file.is_file()]
    return [(file, _text(file, "prompt")) for file in drawn[:_MOST_FOUND]] + sheets


def _text(file: Path, key: str) -> str:
    """A text that `atomdiff sample` wrote into a PNG; empty where there is none."""
    try:
        with Image.open(file) as image:
            return str(image.info.get(key, "")) if "concepts" in image.info else ""
    except (OSError, SyntaxError):  # what Pillow raises for damaged files; naming one is an error when it is stored
        return ""


def _store(file: Path, target: Path) -> None:
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"cannot read the picture {file}: {error}") from error
    Image.frombytes("RGB", upright.size, upright.tobytes()).save(target, format="png")


def _cell(value: Any) -> str:
    return " ".join(_number(value).replace("|", r"\|").split())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80] or "picture"


def _names_repository(name: str) -> bool:
    """Whether a string has the form of "user/repo" and none that only a path has."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.endswith(".safetensors")


def _files_in(folder: Path) -> list[str]:
    """Names of the files of a folder and of the folders in it."""
    found = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _adapter_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if _ADAPTER_FILE.fullmatch(name) or name == LEARNED_EMBEDS_NAME]


def _choose(names: Collection[str], weight_name: str | None, where: str) -> str:
    """The concept file among a folder's files, or "" if the concept is the folder itself, a PEFT adapter."""
    found = [name for name in names if name.endswith(CONCEPT_SUFFIX) and "/" not in name]
    if any(_ADAPTER_SIGN.fullmatch(name) or name == LEARNED_EMBEDS_NAME for name in names):
        found.append(SAFETENSORS_WEIGHTS_NAME)
    if weight_name is None:
        if len(found) > 1:
            raise UserError(f"{where} holds {len(found)} concepts: choose one by weight_name: {', '.join(found)}")
        if not found:
            raise UserError(f"{where} holds no concept: found {some(list(names)) or 'nothing'}; expected {_EXPECTED}")
        weight_name = found[0]
    elif not weight_name.endswith(".safetensors"):
        raise UserError(f"weight_name={weight_name!r}: only safetensors files are loaded; expected {_EXPECTED}")
    elif weight_name not in found and weight_name not in names:
        raise UserError(f"{where} has no {weight_name!r}; the concepts there: {', '.join(found) or 'none'}")
    return "" if weight_name == SAFETENSORS_WEIGHTS_NAME else weight_name


def _listing(api: HfApi, repo_id: str, revision: str | None) -> list[str] | None:
    """Names of a repository's files; None where the Hub does not answer, so that what is in the cache has to do."""
    try:
        return [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or []]
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return None


@contextmanager
def _explained(failed: str, repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into a UserError that says what failed, why, and what to do."""
    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last of the transfer itself
        raise UserError(f"{failed}: {_reason(error, repo_id)}") from error


def _reason(error: Exception, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join(str(getattr(error, "server_message", None) or error).split())
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated; ask for access at {constants.ENDPOINT}/{repo_id}, then {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no repository {repo_id}, or a private one; check the name, or {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision; expected a branch, tag or commit of {constants.ENDPOINT}/{repo_id}"
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in; {_LOG_IN}, with one that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the Hub; unset it"
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub was not asked or does not answer, and an earlier download is not in the cache; go online once"
    if status == 401:
        return f"the Hub does not accept the token; {_LOG_IN}"
    if status == 403:
        return f"the token may not do that ({said}); expected one that may write there"
    if status is None and isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({said}); check the connection"
    return said
