"""One self-contained safetensors file <-> a concept: its settings, deltas, atoms and trigger words."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from atomdiff.errors import UserError
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import TENSOR_KINDS

FORMAT = "atomdiff"
FORMAT_VERSION = "1"
_NAMED_SHOWN = 3

_PEFT_FIELDS = {f.name for f in dataclasses.fields(PeftConfig)}
_NOT_STORED = _PEFT_FIELDS - {"peft_type"} | {"init_weights", "modules_to_save"}
_CONFIG_FIELDS = {f.name for f in dataclasses.fields(AtomConfig)} - _NOT_STORED


@dataclass(frozen=True)
class DeltaFile:
    """What a delta file holds; "module" is a path such as `unet.conv_in`, component first."""

    config: AtomConfig
    """Settings that the deltas were trained with."""
    layers: dict[str, dict[str, Tensor]]
    """Module -> tensors by kind: deltas and atoms (m, d); no atoms with basis `dct`."""
    fingerprint: dict[str, list[float]]
    """Module -> singular values of the base weight's rows, to recognise the base."""
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Trigger word -> text encoder -> embedding (hidden,)."""
    base_model: str = ""
    """Name or path of the base as it was given."""
    trigger_phrase: str = ""
    """What to write in a prompt to get the concept."""
    training: dict[str, Any] = field(default_factory=dict)
    """The run that made it: settings, steps, seed, image count, final loss."""
    modelspec: dict[str, str] = field(default_factory=dict)
    """Fields that other programs read, without their prefix `modelspec.`."""
    atomdiff_version: str = ""
    """Version of atomdiff that wrote the file."""


def write_delta_file(path: str | os.PathLike[str], delta: DeltaFile, dtype: torch.dtype = torch.float16) -> None:
    """Write a concept; the same input gives the same bytes, whatever they replace is replaced at once.

    Raises:
        UserError: a value is not finite, or too large for `dtype`; nothing is written.
    """
    tensors = {f"{module}.{kind}": tensor for module, kinds in delta.layers.items() for kind, tensor in kinds.items()}
    for word, vectors in delta.tokens.items():
        tensors.update({token_key(word, encoder): vector for encoder, vector in vectors.items()})
    tensors = {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"cannot save {some(broken)} as {dtype}: values are not finite or too large for it; "
            "save with dtype=torch.float32, or go back to an earlier checkpoint if the training diverged"
        )
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "adapter_config": _json({key: value for key, value in delta.config.to_dict().items() if key in _CONFIG_FIELDS}),
        "base_model": delta.base_model,
        "base_fingerprint": _json(delta.fingerprint),
        "atomdiff_version": delta.atomdiff_version,
        "trigger_phrase": delta.trigger_phrase,
        "training": _json(delta.training),
        **{f"modelspec.{key}": value for key, value in delta.modelspec.items()},
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(_sort_header(save(tensors, metadata)))
    partial.replace(target)


def read_delta_file(path: str | os.PathLike[str]) -> DeltaFile:
    """Read a concept and check all that can be checked without a base; tensors come as float32.

    Raises:
        UserError: the file is damaged, of another format or version, or holds values that are not finite.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; expected a concept file such as mug.atoms.safetensors")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not an atomdiff file: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {metadata.get('format_version')!r}; this atomdiff reads version "
            f"{FORMAT_VERSION!r}: update atomdiff"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if key.startswith("token."):
            word, encoder = split_token_key(key)
            tokens.setdefault(word, {})[encoder] = tensor
        elif kind in TENSOR_KINDS and tensor.is_floating_point():
            layers.setdefault(module, {})[kind] = tensor
        else:
            raise UserError(f"{path} holds {key!r} ({tensor.dtype}), which this atomdiff does not know: update it")
    return DeltaFile(
        config=_read_config(path, metadata),
        layers=layers,
        fingerprint=_read_fingerprint(path, metadata, layers),
        tokens=tokens,
        base_model=metadata.get("base_model", ""),
        trigger_phrase=metadata.get("trigger_phrase", ""),
        training=_read_json(path, metadata, "training"),
        modelspec={key.removeprefix("modelspec."): metadata[key] for key in metadata if key.startswith("modelspec.")},
        atomdiff_version=metadata.get("atomdiff_version", ""),
    )


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; floating-point tensors come as float32 and must be finite.

    Raises:
        UserError: the file is damaged, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {error}; copy or download it again") from error
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{path} is damaged: {some(broken)} holds values that are not finite")
    floats = {key: t.to(torch.float32) if t.is_floating_point() else t for key, t in tensors.items()}
    return floats, metadata


def token_key(word: str, encoder: str) -> str:
    """(sks, text_encoder) -> `token.sks`; (sks, text_encoder_2) -> `token.sks.text_encoder_2`."""
    return f"token.{word}" if encoder == "text_encoder" else f"token.{word}.{encoder}"


def split_token_key(key: str) -> tuple[str, str]:
    """The word and the text encoder of a key that `token_key` made."""
    name = key.removeprefix("token.")
    word, _, encoder = name.rpartition(".text_encoder_")
    return (word, f"text_encoder_{encoder}") if word and encoder.isdigit() else (name, "text_encoder")


def some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - _NAMED_SHOWN
    return ", ".join(names[:_NAMED_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read_config(path: Any, metadata: Mapping[str, str]) -> AtomConfig:
    values = _read_json(path, metadata, "adapter_config")
    unknown = sorted(values.keys() - _CONFIG_FIELDS)
    if unknown or values.get("peft_type") != "ATOMS":
        found = some(unknown) if unknown else f"peft_type {values.get('peft_type')!r}"
        raise UserError(f"{path} has settings that this atomdiff does not know ({found}): update atomdiff")
    try:
        return AtomConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its settings are not valid: {error}") from error


def _read_fingerprint(path: Any, metadata: Mapping[str, str], layers: Mapping[str, Any]) -> dict[str, list[float]]:
    values = _read_json(path, metadata, "base_fingerprint")
    complete = set(values) == set(layers)
    if not complete or not all(_is_number_list(value) for value in values.values()):
        raise UserError(f"{path} is damaged: its base_fingerprint is not one list of numbers for each layer")
    return values


def _is_number_list(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _read_json(path: Any, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        values = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: no valid {key} in its metadata") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: {key} in its metadata is not a JSON object")
    return values


def _sort_header(data: bytes) -> bytes:
    """The same safetensors file with its header in sorted order; the library writes metadata in random order."""
    size = int.from_bytes(data[:8], "little")
    header = _json(json.loads(data[8 : 8 + size])).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
