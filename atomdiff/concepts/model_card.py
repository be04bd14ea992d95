"""The model card of a concept on the Hugging Face Hub, and what it says of the concept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants

from atomdiff.atoms.variants import variant_of
from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, ConceptFile, read_concept_file, trained_tensors
from atomdiff.concepts.hub import adapter_files, files_in, names_repository
from atomdiff.concepts.sources import label_sources
from atomdiff.utils.hashing import hash_file

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
{% for url in grids %}
![images generated with the concept]({{ url }})
{% endfor %}
| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
"""


@dataclass(frozen=True)
class ConceptSummary:
    """What a repository and its card need to know of a concept."""

    path: Path
    """Its file, or the folder of a PEFT adapter."""
    files: dict[str, Path]
    """Name in the repository -> file."""
    title: str
    """Its name."""
    method: str
    """Its method and size in one clause."""
    architecture: str
    """Architecture as in modelspec; empty if unknown."""
    base_model: str
    """Name or path of its base; empty if unknown."""
    trigger_phrase: str
    """What to write in a prompt to get it."""
    rows: dict[str, Any]
    """Rows of the card's table."""


def summarize_adapter(path: Path, title: str) -> ConceptSummary:
    """Summarize the folder of a PEFT adapter.

    Raises:
        UserError: it cannot be read.
    """
    files = {file: path / file for file in adapter_files(files_in(path))}
    adapters, words, _ = peft_folder.read(path, None, denoiser="")
    config = next((config for config, _ in adapters.values()), None)
    method = str(config.peft_type.value) if config else "token embeddings"
    count = peft_folder.count_trained(adapters, words)
    return ConceptSummary(
        path=path,
        files=files,
        title=title,
        method=f"{method}, {count:,} parameters",
        architecture="",
        base_model=str(config.base_model_name_or_path or "") if config else "",
        trigger_phrase=" ".join(words),
        rows={"method": method, "trainable parameters": count, "bytes": _size(files)},
    )


def summarize_file(path: Path) -> ConceptSummary:
    """Summarize a concept file.

    Raises:
        UserError: it cannot be read.
    """
    contents = read_concept_file(path)
    trained = trained_tensors(contents)
    vectors = [vector for of in contents.tokens.values() for vector in of.values()]
    count, size = sum(tensor.numel() for tensor in trained + vectors), path.stat().st_size
    rows = {
        "method": _method(contents),
        "trainable parameters": f"{count:,}, of which {sum(v.numel() for v in vectors):,} in token embeddings",
        "bytes": size,
        "training": _training(contents.training),
        "made for": ", ".join(filter(None, map(contents.modelspec.get, ("architecture", "resolution")))),
        "written": f"{contents.modelspec.get('date', '')} by atomdiff {contents.atomdiff_version}".strip(),
    }
    return ConceptSummary(
        path=path,
        files={path.name: path},
        title=contents.modelspec.get("title") or path.name.removesuffix(CONCEPT_SUFFIX),
        method=f"{_linked_method(contents)}, {count:,} parameters in {size:,} bytes",
        architecture=contents.modelspec.get("architecture", ""),
        base_model=contents.base_model,
        trigger_phrase=contents.trigger_phrase,
        rows={key: value for key, value in rows.items() if value},
    )


def write_card(
    concept: ConceptSummary, repo_id: str, prompts: Mapping[str, str], license: str | None, tags: Sequence[str]
) -> str:
    """Return README.md.

    Args:
        concept: what is known of the concept.
        repo_id: the repository's full name.
        prompts: image in the repository -> its prompt, or "" for a grid.
        license: the Hub's name of a license.
        tags: further tags.
    """
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
        grids=[url for url, prompt in prompts.items() if not prompt],
        rows={_cell(name): _cell(value) for name, value in concept.rows.items()},
    )
    return str(card)


def _size(files: Mapping[str, Path]) -> int:
    return sum(file.stat().st_size for file in files.values())


def _linked_method(contents: ConceptFile) -> str:
    return "[filter atoms](https://arxiv.org/abs/2403.00269)" if contents.layers else _method(contents)


def _method(contents: ConceptFile) -> str:
    if not contents.layers:
        return "token embeddings"
    config = contents.config
    return f"filter atoms, basis {config.basis}, {variant_of(config).label(config)}, in {len(contents.layers)} layers"


def _training(training: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in training.items() if not isinstance(value, (dict, list))}
    config = training.get("config")
    if isinstance(config, dict):
        plain |= {name: config[name] for name in _TRAINING_SETTINGS if config.get(name) is not None}
    plain |= label_sources(training)
    return ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in plain.items())


def metric_rows(metrics: Mapping[str, Any] | None, concept: ConceptSummary) -> dict[str, Any]:
    """Return rows of the card's table: the metrics given, or those of the concept's own report.json beside it."""
    if metrics is None:
        try:
            metrics = json.loads((concept.path.parent / "report.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(metrics, dict) or metrics.get("file_bytes") != _size(concept.files):
            return {}
        digest = hash_file(concept.path)
        if metrics.get("file_sha256", digest) != digest:
            return {}
        left_out = ("file_bytes", "file_sha256", "num_trainable_parameters", "versions")
        metrics = {name: value for name, value in metrics.items() if name not in left_out}
    rows: dict[str, Any] = {}
    for name, value in metrics.items():
        rows |= {f"{name}, {key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return {name.replace("_", " "): value for name, value in rows.items() if value is not None}


def _code(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _cell(value: Any) -> str:
    return " ".join(_number(value).replace("|", r"\|").split())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
