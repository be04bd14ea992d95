"""Tensors kept on disk by the content that they were made from, so that a second run need not make them again."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.utils.atomic import WriteError, new_file

Tensors = dict[str, Tensor]

_SIDE = 512  # of the squares of 64-bit words that `quick_key` sums up


class DiskCache:
    """A folder with a safetensors file for every key; whoever wants it smaller may remove files, or the folder.

    A file is trusted only if it holds the hash of its key and of the names, types, shapes and numbers in it; any other
    is made anew. Files are moved into place whole, so that processes may share the folder.

    Args:
        folder: Made with the first file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors of a key, on the CPU; `make` them and keep them if they are not there.

        Args:
            key: From `content_key`, of all that the tensors depend on.
            make: Gives the tensors.

        They are given, with a warning, also where they cannot be written.
        """
        found = self._read(key)
        if found is not None:
            return found
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        self._write(key, made)
        return made

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):  # unreadable or damaged
            metadata, tensors = {}, {}
        if metadata == _metadata(key, tensors):
            return tensors
        warnings.warn(f"{file}: damaged, or no file of this cache; made anew", stacklevel=3)
        return None

    def _write(self, key: str, tensors: Tensors) -> None:
        try:
            with new_file(self._file(key)) as file:
                save_file(tensors, file, _metadata(key, tensors))
        except WriteError as error:  # told once for the folder, not for every file
            advice = f"{error.advice}, or name another --cache_dir; until then it is worked out anew each time"
            warnings.warn(f"{self.folder}: cannot be written ({error.reason}); {advice}", stacklevel=3)


def _metadata(key: str, tensors: Tensors) -> dict[str, str]:
    return {"content": content_key(key, tensors_key(tensors))}


def content_key(*parts: str | int | float | bytes) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of some texts, numbers and bytes."""
    plain = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and numbers of some tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def quick_key(tensors: Iterable[Tensor]) -> str:
    """Return a SHA-256 of some tensors that is about as fast as memory is read.

    It is made of each tensor's type, its shape and, of its bytes taken as 64-bit words in squares of 512 by 512, the
    sums of each row and column modulo 2^64; what is left, less than a row, counts whole. So it changes with any one
    word, with any two, and if two are swapped. Changes that leave all these sums alike, in four words of a square or
    more, stay unseen: it is not for what somebody might forge. The order of the tensors counts; names do not, as
    libraries change them.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        end = len(numbers) // (8 * _SIDE) * 8 * _SIDE
        rows = numbers[:end].view(np.uint64).reshape(-1, _SIDE)
        for first in range(0, len(rows), _SIDE):
            square = rows[first : first + _SIDE]  # (512 or less, 512), which caches hold for the second sum
            digest.update(square.sum(axis=0).tobytes())
            digest.update(square.sum(axis=1).tobytes())
        digest.update(numbers[end:].tobytes())
    return digest.hexdigest()


def weights_key(module: Any) -> str:
    """Return the SHA-256 of a diffusers or transformers model: its config, weights, their type and kind of device."""
    own = {"_name_or_path", "_diffusers_version", "transformers_version"}
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    known = json.dumps({name: value for name, value in config.items() if name not in own}, sort_keys=True, default=str)
    device = next(module.parameters()).device.type
    return content_key(known, device, tensors_key(module.state_dict()))
