"""Hashes by which files, folders, tensors and models are recognized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, or one of the names and contents of a folder's files."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def hash_listing(path: Path) -> str:
    """Return a SHA-256 of a file's size and time, or of names, sizes and times in a folder: quick for gigabytes."""
    stats = [(str(file.relative_to(path)), file.stat()) for file in _files(path)]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()


def hash_values(*parts: str | int | float | bytes) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of some texts, numbers and bytes."""
    plain = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and numbers of some tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def quick_hash(tensors: Iterable[Tensor]) -> str:
    """Return the XXH3 (32 hexadecimal digits) of the types, shapes and numbers of some tensors, as fast as memory is.

    It tells what changed by chance, not what somebody forged. The order of the tensors counts; names do not, as
    libraries change them.
    """
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(_describe(tensor))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def hash_model(module: Any) -> str:
    """Return the SHA-256 of a diffusers or transformers model: its config, weights, their type and kind of device."""
    own = {"_name_or_path", "_diffusers_version", "transformers_version"}
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    known = json.dumps({name: value for name, value in config.items() if name not in own}, sort_keys=True, default=str)
    device = next(module.parameters()).device.type
    return hash_values(known, device, hash_tensors(module.state_dict()))


def _describe(tensor: Tensor) -> bytes:
    return json.dumps([str(tensor.dtype), list(tensor.shape)]).encode()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
