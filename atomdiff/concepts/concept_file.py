"""One self-contained safetensors file <-> a concept: its settings, deltas, atoms and trigger words."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from atomdiff.atoms.settings import SETTINGS, AtomSettings
from atomdiff.atoms.variants import PARAMETER_NAMES, TENSOR_NAMES
from atomdiff.concepts import compact_layers, shared_tensors
from atomdiff.concepts.compact_metadata import compact_modelspec, compact_training
from atomdiff.concepts.token_keys import check_words, split_token_key, token_tensors
from atomdiff.utils.atomic import write_bytes
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import (
    MAX_FILE_BYTES,
    MAX_SINGULAR_VALUE,
    list_some,
    parse_json,
    printable,
    read_finite_tensors,
    read_safetensors_header,
)

if TYPE_CHECKING:
    from atomdiff.tuner.config import AtomConfig

FORMAT = "atomdiff"
FORMAT_VERSION = "1"
NEWER_VERSION = "2"  # of files with settings that version 1 lacks; all others stay of version 1
CONCEPT_SUFFIX = ".atoms.safetensors"

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

_VERSION_1_FIELDS = frozenset(
    "peft_type num_atoms channel_block channel_block_pattern joint recursion basis sparsity seed "
    "target_modules exclude_modules layers_to_transform layers_pattern".split()
)
_CONFIG_FIELDS = _VERSION_1_FIELDS | SETTINGS
_NEWER_DEFAULTS = {f.name: f.default for f in fields(AtomSettings) if f.name not in _VERSION_1_FIELDS}


@dataclass(frozen=True)
class ConceptFile:
    """What a concept file holds; "module" is a path such as `unet.conv_in`, component first."""

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


def write_concept_file(path: str | os.PathLike[str], concept: ConceptFile, dtype: torch.dtype = torch.float16) -> None:
    """Write a concept; the same input gives the same bytes, whatever they replace is replaced at once.

    Raises:
        UserError: a value is not finite, or too large for `dtype`, or there is more than a file may hold; nothing is
            written.
    """
    check_words(path, concept.tokens)
    data = concept_bytes(concept, dtype)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(
            f"the concept would take {len(data):,} bytes, expected at most {MAX_FILE_BYTES:,}: train fewer parameters"
        )
    write_bytes(path, data)


def concept_bytes(concept: ConceptFile, dtype: torch.dtype = torch.float16) -> bytes:
    """The contents of a concept's file.

    Raises:
        UserError: a value is not finite, or too large for `dtype`.
    """
    tensors = _cast(_by_key(concept.layers) | token_tensors(concept.tokens), dtype)
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(
            f"cannot save {list_some(broken)} as {dtype}: values are not finite or too large for it; "
            "save with dtype=torch.float32, or go back to an earlier checkpoint if the training diverged"
        )
    is_compact = concept.config.share is not None
    if is_compact:
        table, values = compact_layers.pack(concept.layers, concept.fingerprint)
        tensors = _cast({compact_layers.VALUES: values} | token_tensors(concept.tokens), dtype)
        tensors[compact_layers.TABLE] = torch.frombuffer(bytearray(table), dtype=torch.uint8)
    config = concept.config.to_dict()
    newer = {key: config[key] for key, default in _NEWER_DEFAULTS.items() if config[key] != default}
    settings = {key: config[key] for key in config.keys() & _VERSION_1_FIELDS} | newer
    training, modelspec = concept.training, concept.modelspec
    if is_compact:
        defaults = type(concept.config)().to_dict() | {"peft_type": None}
        settings = {key: value for key, value in settings.items() if value != defaults[key]}
        training, modelspec = compact_training(training), compact_modelspec(modelspec)
    metadata = {
        "format": FORMAT,
        "format_version": NEWER_VERSION if newer else FORMAT_VERSION,
        "adapter_config": _json(settings),
        "base_model": concept.base_model,
        **({} if is_compact else {"base_fingerprint": _json(concept.fingerprint)}),
        "atomdiff_version": concept.atomdiff_version,
        "trigger_phrase": concept.trigger_phrase,
        "training": _json(training),
        **{f"modelspec.{key}": value for key, value in modelspec.items()},
    }
    return sort_header(save(tensors, metadata))


def read_concept_file(path: str | os.PathLike[str], settings_only: bool = False) -> ConceptFile:
    """Read a concept and check all that can be checked without a base; tensors come as float32.

    The header is checked before any tensor is read. Names and paths in it are only texts, never opened.

    Args:
        path: the file.
        settings_only: make `config` an `AtomSettings`, all that computing the weights takes; without PEFT, which an
            `AtomConfig` needs.

    Raises:
        UserError: the file is damaged, of another format or version, or holds values that are not finite.
    """
    metadata, dtypes = read_header(path)
    if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a concept has at most {MAX_FILE_BYTES:,}")
    for key, dtype in dtypes.items():
        kind = key.rpartition(".")[2]
        is_known = key.startswith("token.") or kind in TENSOR_NAMES or shared_tensors.is_packed(key)
        is_table, is_values = key == compact_layers.TABLE, key == compact_layers.VALUES
        if not (dtype == "U8" if is_table else dtype in _DTYPES and (is_known or is_values)):
            raise UserError(
                f"{path} holds {list_some([key])!r} ({printable(dtype)}), which this atomdiff does not know: update it"
            )
    config = _read_config(path, metadata, settings_only)
    check_words(path, {split_token_key(key)[0] for key in dtypes if key.startswith("token.")})
    modules = {key.rpartition(".")[0] for key in dtypes if not key.startswith("token.")}
    is_compact = config.share is not None and not dtypes.keys().isdisjoint(compact_layers.KEYS)
    fingerprint = {} if is_compact else _read_fingerprint(path, metadata, None if config.share else modules)
    of_layers: dict[str, Tensor] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_finite_tensors(path).items():
        if key.startswith("token."):
            word, encoder = split_token_key(key)
            tokens.setdefault(word, {})[encoder] = tensor
        else:
            of_layers[key] = tensor
    if is_compact:
        layers, fingerprint = _unpack_compact(path, of_layers, config.share_count)
    elif config.share:
        layers = _unpack_first(path, metadata, of_layers, fingerprint)
    else:
        layers = _by_module(of_layers)
    return ConceptFile(
        config=config,
        layers=layers,
        fingerprint=fingerprint,
        tokens=tokens,
        base_model=metadata.get("base_model", ""),
        trigger_phrase=metadata.get("trigger_phrase", ""),
        training=_read_json(path, metadata, "training"),
        modelspec={key.removeprefix("modelspec."): metadata[key] for key in metadata if key.startswith("modelspec.")},
        atomdiff_version=metadata.get("atomdiff_version", ""),
    )


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Metadata of a concept file, and its tensors' names with their dtypes as safetensors writes them, such as "F16".

    Nothing behind the header is read.

    Raises:
        UserError: the file is damaged or cut off, or of another format or version.
    """
    metadata, dtypes = read_safetensors_header(path)
    if metadata.get("format") != FORMAT:
        found = printable(repr(metadata.get("format")))
        raise UserError(f"{path} is not an atomdiff file: its format is {found}, not {FORMAT!r}")
    if metadata.get("format_version") not in (FORMAT_VERSION, NEWER_VERSION):
        found = printable(repr(metadata.get("format_version")))
        raise UserError(
            f"{path} has format version {found}; this atomdiff reads versions {FORMAT_VERSION!r} and "
            f"{NEWER_VERSION!r}: update atomdiff"
        )
    return metadata, dtypes


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of the tensors in a concept file.

    Raises:
        UserError: as for `read_header`.
    """
    return next((_DTYPES[dtype] for dtype in read_header(path)[1].values() if dtype in _DTYPES), torch.float16)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file; floating-point tensors come as float32 and must be finite.

    Raises:
        UserError: the file is damaged, or holds values that are not finite.
    """
    read_safetensors_header(path)  # which takes no more memory than the file is large
    return read_finite_tensors(path)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Name -> shape."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def trained_tensors(concept: ConceptFile) -> list[Tensor]:
    """The trained tensors of a concept's layers, those that layers share once, without trigger words."""
    tensors = (tensor for kinds in concept.layers.values() for kind, tensor in kinds.items() if kind in PARAMETER_NAMES)
    return list({id(tensor): tensor for tensor in tensors}.values())


def _by_key(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{module}.{kind}": tensor for module, kinds in layers.items() for kind, tensor in kinds.items()}


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        layers.setdefault(module, {})[kind] = tensor
    return layers


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}


def _unpack_compact(
    path: Any, tensors: Mapping[str, Tensor], num_directions: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    with _damaged(path, "its layers cannot be read"):
        if unfit := compact_layers.KEYS ^ tensors.keys():
            raise ValueError(f"{list_some(sorted(unfit))} is missing, or has no place beside a layer_table")
        return compact_layers.unpack(tensors[compact_layers.TABLE], tensors[compact_layers.VALUES], num_directions)


def _unpack_first(
    path: Any, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], modules: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    with _damaged(path, "its shared_layers do not fit"):
        return shared_tensors.unpack(tensors, _read_json(path, metadata, "shared_layers"), list(modules))


@contextmanager
def _damaged(path: Any, what: str) -> Iterator[None]:
    """Turn a ValueError into a message of a damaged file."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {what}: {printable(str(error))}; copy or download it again") from error


def _read_config(path: Any, metadata: Mapping[str, str], settings_only: bool) -> AtomConfig:
    values = _read_json(path, metadata, "adapter_config")
    unknown = sorted(values.keys() - _CONFIG_FIELDS)
    if unknown or values.get("peft_type") != "ATOMS":
        found = list_some(unknown) or printable(f"peft_type {values.get('peft_type')!r}")
        raise UserError(f"{path} has settings that this atomdiff does not know ({found}): update atomdiff")
    version = NEWER_VERSION if values.keys() - _VERSION_1_FIELDS else FORMAT_VERSION
    if metadata["format_version"] != version:
        raise UserError(
            f"{path} is damaged: it has settings of format version {version!r} and says that its version is "
            f"{metadata['format_version']!r}"
        )
    try:
        if settings_only:
            settings = {name: value for name, value in values.items() if name in SETTINGS}
            return cast("AtomConfig", AtomSettings(**settings))
        from atomdiff.tuner.config import AtomConfig

        return AtomConfig(**values)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its settings are not valid: {printable(str(error))}") from error


def _read_fingerprint(path: Any, metadata: Mapping[str, str], layers: Collection[str] | None) -> dict[str, list[float]]:
    """The fingerprint, of exactly these layers where they are known."""
    values = _read_json(path, metadata, "base_fingerprint")
    if (layers is not None and set(values) != set(layers)) or not all(
        _is_number_list(value) for value in values.values()
    ):
        raise UserError(f"{path} is damaged: its base_fingerprint is not one list of numbers for each layer")
    return values


def _is_number_list(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and 0 <= v < MAX_SINGULAR_VALUE for v in values)


def _read_json(path: Any, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        return parse_json(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: no valid {key} in its metadata: {printable(str(error))}") from error


def sort_header(data: bytes) -> bytes:
    """The same safetensors file with its header in sorted order; the library writes metadata in random order."""
    size = int.from_bytes(data[:8], "little")
    header = _json(json.loads(data[8 : 8 + size])).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
