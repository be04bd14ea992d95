"""Concepts of any PEFT method in folders as PEFT writes them, with their token embeddings in a file beside."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save, save_file
from torch import Tensor

import atomdiff.activation_adapters  # noqa: F401 - PEFT knows its methods from then on
from atomdiff.concepts.concept_file import read_tensors, sort_header
from atomdiff.concepts.layer_choice import with_chosen_layers, without_idle_layers
from atomdiff.concepts.token_keys import check_words, split_token_key, token_tensors
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.removable import why_not_removable
from atomdiff.tuner.shared_directions import in_each_layer, stored_once
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_CONFIG_BYTES, check_patterns, list_some, parse_json, printable

LEARNED_EMBEDS_NAME = "learned_embeds.safetensors"

_ELSEWHERE = ("adapters", "megatron_config", "shadow_model")  # make PEFT open other files, or import modules

Adapters = dict[str, tuple[PeftConfig, dict[str, Tensor]]]
Tokens = dict[str, dict[str, Tensor]]


def write(
    path: Path, adapters: Adapters, tokens: Tokens, denoiser: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a concept, the same bytes for the same input; what it replaces is removed once all is written.

    Of adapters whose layers were chosen by scores, it gets the layers that act; directions that layers share, once.

    Args:
        path: the folder, created if it is missing; other files in it stay.
        adapters: component -> config and tensors; components other than the denoiser get a subfolder each.
        tokens: trigger word -> text encoder -> embedding (hidden,).
        denoiser: the component whose adapter lies in `path` itself.
        metadata: metadata of the adapter files.
    """
    names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    own = [LEARNED_EMBEDS_NAME, *names, *(f"text_encoder*/{name}" for name in names)]
    with new_folder(path, own) as unfinished:
        for component, (config, tensors) in adapters.items():
            if isinstance(config, AtomConfig) and config.select == "adaptive":
                config, tensors = without_idle_layers(config, tensors)
                if not tensors:
                    continue
            _write_adapter(_folder(unfinished, component, denoiser), config, tensors, metadata or {})
        if tokens:
            vectors = {key: vector.detach().cpu().contiguous() for key, vector in token_tensors(tokens).items()}
            save_file(vectors, unfinished / LEARNED_EMBEDS_NAME, metadata={"format": "pt"})


def _write_adapter(
    folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the two files of an adapter."""
    stored = copy.deepcopy(config)
    stored.inference_mode = True
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(stored, key, sorted(value))
    stored.save_pretrained(str(folder))
    if isinstance(config, AtomConfig):
        tensors = stored_once(tensors)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}  # some methods share them between layers
    data = sort_header(save(tensors, {"format": "pt", **metadata}))
    (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(data)


def adapter_bytes(config: AtomConfig, tensors: Mapping[str, Tensor], modules: Collection[str]) -> int:
    """Count the bytes of the two files that `write` makes of an adapter with these of its layers, without metadata."""
    with TemporaryDirectory() as folder:
        _write_adapter(Path(folder), *with_chosen_layers(config, tensors, modules), {})
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def read(path: Path, components: Iterable[str] | None, denoiser: str) -> tuple[Adapters, Tokens, list[str]]:
    """Read a concept written by `write`, or adapters saved by PEFT itself, in a folder for each component.

    Args:
        path: the folder.
        components: those that may have an adapter; None: any.
        denoiser: the component whose adapter lies in `path` itself, or in a folder of that name as those of others do.

    Returns:
        The adapters by component, the token embeddings, and what was skipped, for a message.

    Raises:
        UserError: the folder holds neither an adapter nor token embeddings, or they cannot be read.
    """
    adapters: Adapters = {}
    found = {file.parent.name: file.parent for file in sorted(path.glob(f"*/{CONFIG_NAME}"))}
    if (path / CONFIG_NAME).is_file():
        if denoiser in found:
            raise UserError(f"{path} and {found[denoiser]} both hold an adapter for {denoiser}: remove one of them")
        found[denoiser] = path
    components = set(found if components is None else components)
    for component in sorted(found.keys() & components):
        folder = found.pop(component)
        adapters[component] = (_read_config(folder), in_each_layer(read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)))
    absent = sorted(found)
    left_out = [f"the adapters in {list_some(absent)}, which this pipeline does not have"] if absent else []
    tokens = _read_tokens(path / LEARNED_EMBEDS_NAME)
    if absent and not adapters and not tokens:
        raise UserError(
            f"{path} has adapters for {list_some(absent)}, which this pipeline does not have: expected some for "
            f"{list_some(sorted(components))}; where they are concepts of their own, choose one by subfolder"
        )
    if not adapters and not tokens:
        raise UserError(f"{path} holds no concept: expected {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} in it")
    return adapters, tokens, left_out


def trained_tensors(adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that were trained, by kind: not what some methods keep beside them, such as indices.

    What layers share comes once.
    """
    for config, tensors in adapters.values():
        layer: Any = PEFT_TYPE_TO_TUNER_MAPPING[cast(Any, config).peft_type].tuner_layer_cls
        seen: set[int] = set()  # of what layers share
        for key, tensor in tensors.items():
            kind = next((name for name in key.split(".") if name in layer.adapter_layer_names), None)
            if kind and id(tensor) not in seen:
                yield kind, tensor
            seen.add(id(tensor))


def count_trained(adapters: Adapters, tokens: Tokens) -> int:
    """Count the trained parameters of what `read` returns."""
    vectors = [vector for of in tokens.values() for vector in of.values()]
    return sum(tensor.numel() for tensor in [*vectors, *(tensor for _, tensor in trained_tensors(adapters))])


def _read_tokens(file: Path) -> Tokens:
    """Read token embeddings; none where there is no such file."""
    tokens: Tokens = {}
    for key, vector in (read_tensors(file) if file.is_file() else {}).items():
        if not (key.startswith("token.") and vector.is_floating_point()):
            raise UserError(f"{file} holds {list_some([key])}, not only embeddings 'token.<word>'")
        word, encoder = split_token_key(key)
        tokens.setdefault(word, {})[encoder] = vector
    check_words(file, tokens)
    return tokens


def _folder(path: Path, component: str, denoiser: str) -> Path:
    return path if component == denoiser else path / component


def _read_config(folder: Path) -> PeftConfig:
    file = folder / CONFIG_NAME
    try:
        if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
        values = parse_json(file.read_text("utf-8"))
        if not isinstance(values.get("peft_type"), str):
            raise ValueError("it has no peft_type")
        if elsewhere := [key for key in _ELSEWHERE if values.get(key) is not None]:
            raise ValueError(f"it names other files or modules ({list_some(elsewhere)}), which atomdiff does not open")
        check_patterns(_patterns(values))
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT checks little: a value that it does not expect can fail anywhere
        raise UserError(f"cannot read {file}: {printable(str(error))}") from error
    if change := why_not_removable(config):
        raise UserError(f"{folder} could not be removed exactly again: {change}")
    return config


def _patterns(values: dict[str, Any]) -> Iterator[str]:
    """Yield what PEFT uses as regular expressions: strings for module names, and the keys of patterns."""
    for key, value in values.items():
        if isinstance(value, str) and key.endswith("_modules"):
            yield value
        elif isinstance(value, dict):
            yield from value
        elif key == "methods" and isinstance(value, list):
            for each in value:
                yield from _patterns(each) if isinstance(each, dict) else ()
        elif key == "layers_pattern":
            yield from value if isinstance(value, list) else [str(value)]
