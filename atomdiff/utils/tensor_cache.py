"""Tensors kept on disk by the content that they were made from, so that a second run need not make them again."""

import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.utils.atomic import WriteError, new_file
from atomdiff.utils.hashing import hash_tensors, hash_values

Tensors = dict[str, Tensor]


class DiskCache:
    """A folder with a safetensors file for every key; whoever wants it smaller may remove files, or the folder.

    A file is trusted only if it holds the hash of its key and of the names, types, shapes and numbers in it; any other
    is made anew. Files are moved into place whole, so that processes may share the folder.

    Args:
        folder: made with the first file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors of a key, on the CPU; `make` them and keep them if they are not there.

        Args:
            key: from `hash_values`, of all that the tensors depend on.
            make: gives the tensors.

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
        warnings.warn(f"{file}: damaged, or no file of this cache; computed again", stacklevel=3)
        return None

    def _write(self, key: str, tensors: Tensors) -> None:
        try:
            with new_file(self._file(key)) as file:
                save_file(tensors, file, _metadata(key, tensors))
        except WriteError as error:  # told once for the folder, not for every file
            advice = f"{error.advice}, or name another --cache_dir; until then it is computed again in every run"
            warnings.warn(f"{self.folder}: cannot be written ({error.reason}); {advice}", stacklevel=3)


def _metadata(key: str, tensors: Tensors) -> dict[str, str]:
    return {"content": hash_values(key, hash_tensors(tensors))}
