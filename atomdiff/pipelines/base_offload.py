"""Offload of base weights: where they are kept while merged weights are in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomdiff.tuner.weight_access import has_stream, walk
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import quick_hash

BaseOffload = Literal["device", "cpu", "file"]
"""`device`: beside the weights, which takes their memory once more and is fastest. `cpu`: in the memory of the host.
`file`: in the checkpoint that the model was loaded from, which is read again (memory-mapped) for every switch."""


@dataclass(frozen=True)
class HostCopy:
    """A base weight in the host's memory."""

    weight: Tensor
    """The weight, on the CPU."""

    def check(self) -> None:
        """Do nothing: memory does not change."""

    def __call__(self) -> Tensor:
        """The weight."""
        return self.weight


@dataclass(frozen=True)
class FileWeight:
    """A base weight in a safetensors file."""

    file: Path
    """The file."""
    key: str
    """Its key there."""
    dtype: torch.dtype
    """The dtype that it was loaded in."""
    content: str
    """`quick_hash` of the stored tensor, when the base weight was offloaded to the file."""
    file_stat: tuple[int, ...]
    """Device, inode, size and times of the file: where they are unchanged, so are its contents."""

    @classmethod
    def of(cls, file: Path, key: str, dtype: torch.dtype) -> FileWeight:
        """The weight that a file has now."""
        return cls(file, key, dtype, quick_hash([_read(file, key)]), _file_stat(file))

    def check(self) -> None:
        """Check that the file still has the weight.

        Raises:
            UserError: the file is not there any more, or the weight in it is another.
        """
        self._stored()

    def __call__(self) -> Tensor:
        """The weight as it was loaded.

        Raises:
            UserError: the file is not there any more, or the weight in it is another.
        """
        return self._stored().to(self.dtype)

    def _stored(self) -> Tensor:
        try:
            untouched = _file_stat(self.file) == self.file_stat
            stored = _read(self.file, self.key)
            if untouched or quick_hash([stored]) == self.content:
                return stored
            reason = f"{self.key} in it has changed"
        except (OSError, SafetensorError) as error:
            reason = str(error)
        raise UserError(f"the base weights were offloaded to {self.file}, put it back as it was: {reason}")


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def _file_stat(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def base_weight_readers(
    model: Any, layers: dict[str, Any], offload_base: BaseOffload | None
) -> dict[str, Callable[[], Tensor] | None]:
    """Decide for every layer, by module path, what reads its base weight; None: a copy on the device does.

    Without `offload_base` they stay where they are by now, at first on the device; but on the CPU where diffusers
    offloads the model with a stream, which does not know new tensors.

    Raises:
        UserError: `offload_base` is unknown, or `file` and a base weight is in no file of the model's folder, as it is.
    """
    if offload_base is not None and offload_base not in get_args(BaseOffload):
        raise UserError(f"offload_base={offload_base!r}: expected one of {', '.join(map(repr, get_args(BaseOffload)))}")
    if offload_base == "file":
        return dict(_file_weights(model, layers))
    if offload_base == "cpu" or any(has_stream(module) for _, module in walk(model)):
        return {path: _host_copy(layer) for path, layer in layers.items()}
    return {path: layer.base_weight.offloaded if offload_base is None else None for path, layer in layers.items()}


def _host_copy(layer: Any) -> HostCopy:
    if isinstance(layer.base_weight.offloaded, HostCopy):
        return layer.base_weight.offloaded
    copy = layer.unmerged_weight().detach().to("cpu", copy=True)
    return HostCopy(copy.pin_memory() if torch.cuda.is_available() else copy)


def _file_weights(model: Any, layers: dict[str, Any]) -> Iterable[tuple[str, FileWeight]]:
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "") or "?")
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    files_by_key: dict[str, list[Path]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                files_by_key.setdefault(key, []).append(file)
    for path, layer in layers.items():
        if isinstance(layer.base_weight.offloaded, FileWeight):
            yield path, layer.base_weight.offloaded
            continue
        base = layer.unmerged_weight().detach()
        key = f"{path}.weight"
        keys = [key] if key in files_by_key else [stored for stored in files_by_key if stored.endswith(f".{key}")]
        candidates = ((file, stored) for stored in keys for file in files_by_key[stored])
        location = next((each for each in candidates if _has_weight(*each, base)), None)
        if location is None:
            where = (
                f"the {len(files)} safetensors file(s) of {folder}" if files else f"a checkpoint (looked in {folder})"
            )
            raise UserError(
                f"offload_base='file': the weight of {path} as it is now is not in {where}; "
                "load the pipeline from a folder of safetensors files, or use offload_base='cpu'"
            )
        yield path, FileWeight.of(*location, base.dtype)


def _has_weight(file: Path, key: str, base: Tensor) -> bool:
    stored = _read(file, key).to(base.dtype)
    return stored.shape == base.shape and torch.equal(stored.to(base.device), base)
