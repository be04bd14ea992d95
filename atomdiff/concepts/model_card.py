"""What a repository of a concept on the Hugging Face Hub holds: its files, example pictures and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants
from PIL import Image

from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, DeltaFile, read_delta_file
from atomdiff.concepts.hub import PathLike, Pictures, adapter_files, files_in, locate, names_repository
from atomdiff.data.image_files import open_upright
from atomdiff.tuner.layer import TRAINED_KINDS
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file

_MOST_FOUND = 8  # example pictures taken without being named
_TRAINING_SETTINGS = ("learning_rate", "token_learning_rate", "lr_scheduler", "train_batch_size")
_BROKEN_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises

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
        UserError: the folder is not empty, or the concept or a picture cannot be read; nothing is written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty: name an empty or a new folder")
    located, title = locate(Path(path))
    concept = _read_atoms(located) if located.is_file() else _read_adapter(located, title)
    concept = replace(
        concept,
        base_model=base_model or concept.base_model,
        trigger_phrase=trigger_phrase or concept.trigger_phrase,
        rows={**concept.rows, **_figures(figures, concept)},
    )
    shown = {
        f"images/{number:02d}-{_slug(file.stem)}.png": (_open_picture(file), prompt)
        for number, (file, prompt) in enumerate(_example_pictures(pictures, concept.path))
    }
    card = _model_card(concept, repo_id, {name: prompt for name, (_, prompt) in shown.items()}, license, tags)
    with new_folder(folder) as unfinished:
        for name, file in concept.files.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, unfinished / name)
        for name, (image, _) in shown.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            image.save(unfinished / name, format="png")
        (unfinished / "README.md").write_text(card, encoding="utf-8")
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
    rows: dict[str, Any]
    """Of the card's table."""


def _model_card(
    concept: _Concept, repo_id: str, prompts: Mapping[str, str], license: str | None, tags: Sequence[str]
) -> str:
    """README.md; `prompts` has a prompt for each picture's name, or "" for a sheet of several."""
    base, phrase = concept.base_model, concept.trigger_phrase
    on_hub = names_repository(base) and not Path(base).exists()
    base_link = f"[{base}]({constants.ENDPOINT}/{base})" if on_hub else f"`{Path(base).name}`"
    gallery = [{"text": prompt, "output": {"url": url}} for url, prompt in prompts.items() if prompt]
    family = re.match("stable-diffusion(-xl)?", concept.architecture)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="atomdiff",
        license=license,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "atomdiff", *([family[0]] if family else []), *tags],
        instance_prompt=phrase or None,
        widget=gallery or None,
    )
    weight_name = "" if concept.path.is_dir() else f", weight_name={_code(concept.path.name)}"
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=concept.title,
        gallery=gallery,
        base_name=base_link if base else "Stable Diffusion",
        method=concept.method,
        phrase=phrase,
        base_code=_code(base if on_hub else f"path/to/{Path(base or 'the-base').name}"),
        load_code=_code(repo_id) + weight_name,
        prompt_code=_code(next(filter(None, prompts.values()), f"a photo of {phrase or '...'}")),
        sheets=[url for url, prompt in prompts.items() if not prompt],
        rows={_cell(name): _cell(value) for name, value in concept.rows.items()},
    )
    return str(card)


def _read_adapter(path: Path, title: str) -> _Concept:
    files = {file: path / file for file in adapter_files(files_in(path))}
    components = {file.rpartition("/")[0] for file in files}  # "" is the denoiser
    adapters, words, _ = peft_folder.read(path, components, denoiser="")
    config = next((config for config, _ in adapters.values()), None)
    kind = str(config.peft_type.value) if config else "a word"
    tensors = [*(tensors for _, tensors in adapters.values()), *words.values()]
    count = sum(tensor.numel() for each in tensors for tensor in each.values())
    return _Concept(
        path=path,
        files=files,
        title=title,
        method=f"{kind}, {count:,} numbers",
        architecture="",
        base_model=str(config.base_model_name_or_path or "") if config else "",
        trigger_phrase=" ".join(words),
        rows={"method": kind, "numbers trained": count, "bytes": _size(files)},
    )


def _read_atoms(path: Path) -> _Concept:
    delta = read_delta_file(path)
    trained = [tensor for kinds in delta.layers.values() for kind, tensor in kinds.items() if kind in TRAINED_KINDS]
    vectors = [vector for of in delta.tokens.values() for vector in of.values()]
    count, size = sum(tensor.numel() for tensor in trained + vectors), path.stat().st_size
    rows = {
        "method": _method(delta),
        "numbers trained": f"{count:,}, of which {sum(v.numel() for v in vectors):,} in trigger words",
        "bytes": size,
        "training": _training(delta.training),
        "made for": ", ".join(filter(None, map(delta.modelspec.get, ("architecture", "resolution")))),
        "written": f"{delta.modelspec.get('date', '')} by atomdiff {delta.atomdiff_version}".strip(),
    }
    return _Concept(
        path=path,
        files={path.name: path},
        title=delta.modelspec.get("title") or path.name.removesuffix(CONCEPT_SUFFIX),
        method=f"[filter atoms](https://arxiv.org/abs/2403.00269), {count:,} numbers in {size:,} bytes",
        architecture=delta.modelspec.get("architecture", ""),
        base_model=delta.base_model,
        trigger_phrase=delta.trigger_phrase,
        rows={key: value for key, value in rows.items() if value},
    )


def _size(files: Mapping[str, Path]) -> int:
    return sum(file.stat().st_size for file in files.values())


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
        if not isinstance(figures, dict) or figures.get("file_bytes") != _size(concept.files):
            return {}
        digest = hash_file(concept.path)
        if figures.get("file_sha256", digest) != digest:
            return {}
        unshown = ("file_bytes", "file_sha256", "num_trainable_parameters", "versions")
        figures = {name: value for name, value in figures.items() if name not in unshown}
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        rows |= {f"{name}, {key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return {name.replace("_", " "): value for name, value in rows.items() if value is not None}


def _example_pictures(pictures: Pictures | None, concept: Path) -> list[tuple[Path, str]]:
    """Files and their prompts; no prompt for sheets of several pictures."""
    if isinstance(pictures, Mapping):
        return [(Path(file), prompt) for file, prompt in pictures.items()]
    if pictures is None:
        return _drawn_with(concept, concept.parent)
    files = [Path(file) for file in ([pictures] if isinstance(pictures, (str, os.PathLike)) else pictures)]
    found = (_drawn_with(concept, file) if file.is_dir() else [(file, _text(file, "prompt"))] for file in files)
    return list(chain.from_iterable(found))


def _drawn_with(concept: Path, folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder that say they were drawn with this concept, and the sheets of them."""
    digest = hash_file(concept)
    drawn = [file for file in sorted(folder.glob("*.png")) if digest in _text(file, "concepts")]
    manifest = folder / "manifest.json"
    ours = manifest.is_file() and digest.encode() in manifest.read_bytes()
    sheets = [folder / name for name in (["grid.png", "contact_sheet.png"] if ours else ["contact_sheet.png"])]
    pictures = [(file, _text(file, "prompt")) for file in drawn[:_MOST_FOUND]]
    return pictures + [(file, "") for file in sheets if file.is_file()]


def _text(file: Path, key: str) -> str:
    """A text that `atomdiff sample` wrote into a PNG; empty where there is none."""
    try:
        with Image.open(file) as image:
            return str(image.info.get(key, "")) if "concepts" in image.info else ""
    except _BROKEN_PICTURE:  # naming such a file is an error when it is opened
        return ""


def _open_picture(file: Path) -> Image.Image:
    """A picture as it is seen, without its metadata."""
    try:
        image = open_upright(file).convert("RGB")
    except UserError as error:
        raise UserError(f"cannot read the picture {file}: {error}") from error
    return Image.frombytes("RGB", image.size, image.tobytes())


def _code(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _cell(value: Any) -> str:
    return " ".join(_number(value).replace("|", r"\|").split())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80] or "picture"
