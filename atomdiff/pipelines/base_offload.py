"""Where base weights are kept while others are in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        """Nothing can happen to it."""

    def __call__(self) -> Tensor:
        """The weight."""
        return self.weight


@dataclass(frozen=True)
class FileWeight:
    """A base weight in a safetensors file."""

    file: Path
    """The file."""
    key: str
    """Its name there."""
    dtype: torch.dtype
    """The dtype that it was loaded in."""
    content: str
    """`quick_hash` of the stored tensor, when the base weight was left to the file."""
    written: tuple[int, ...]
    """What tells, without a look at the contents, that nobody has written to the file since."""

    @classmethod
    def of(cls, file: Path, key: str, dtype: torch.dtype) -> FileWeight:
        """What the file holds by now."""
        return cls(file, key, dtype, quick_hash([_read(file, key)]), _written(file))

    def check(self) -> None:
        """Check that the file has the weight that was left to it.

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
            untouched = _written(self.file) == self.written
            found = _read(self.file, self.key)
            if untouched or quick_hash([found]) == self.content:
                return found
            reason = f"{self.key} in it is another one now"
        except (OSError, SafetensorError) as error:
            reason = str(error)
        raise UserError(f"the base weights were kept in {self.file}, put it back as it was: {reason}")


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def _written(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_offload(place: str | None) -> None:
    """Check the name of a place.

    Raises:
        UserError: there is no such place.
    """
    if place is not None and place not in get_args(BaseOffload):
        raise UserError(f"offload_base={place!r}: expected one of {', '.join(map(repr, get_args(BaseOffload)))}")


def keep(model: Any, layers: dict[str, Any], place: BaseOffload | None) -> dict[str, Callable[[], Tensor] | None]:
    """Decide for every layer where its base weight is read from.

    Args:
        model: the model, as it was loaded.
        layers: module path -> atom layer.
        place: where to keep it; None: where it is kept by now, at first on the device.

    Returns:
        Module path -> what reads the base weight; None: a copy on the device.

    Raises:
        UserError: `place` is `file` and a base weight is in no file of the model's folder, as it is.
    """
    if place == "file":
        return dict(_find_in_files(model, layers))
    if place == "cpu":
        return {path: _on_host(layer) for path, layer in layers.items()}
    return {path: layer.base_weight.offloaded if place is None else None for path, layer in layers.items()}


def _on_host(layer: Any) -> HostCopy:
    if isinstance(layer.base_weight.offloaded, HostCopy):
        return layer.base_weight.offloaded
    copy = layer.unmerged_weight().detach().to("cpu", copy=True)
    return HostCopy(copy.pin_memory() if torch.cuda.is_available() else copy)


def _find_in_files(model: Any, layers: dict[str, Any]) -> Iterable[tuple[str, FileWeight]]:
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "") or "?")
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    places: dict[str, list[Path]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                places.setdefault(key, []).append(file)
    for path, layer in layers.items():
        if isinstance(layer.base_weight.offloaded, FileWeight):
            yield path, layer.base_weight.offloaded
            continue
        base = layer.unmerged_weight().detach()
        key = f"{path}.weight"
        keys = [key] if key in places else [other for other in places if other.endswith(f".{key}")]
        candidates = [(file, each) for each in keys for file in places[each]]
        found = next((place for place in candidates if _holds(*place, base)), None)
        if found is None:
            where = (
                f"the {len(files)} safetensors file(s) of {folder}" if files else f"a checkpoint (looked in {folder})"
            )
            raise UserError(
                f"offload_base='file': the weight of {path} as it is now is not in {where}; "
                "load the pipeline from a folder of safetensors files, or use offload_base='cpu'"
            )
        yield path, FileWeight.of(*found, base.dtype)


def _holds(file: Path, key: str, base: Tensor) -> bool:
    stored = _read(file, key).to(base.dtype)
    return stored.shape == base.shape and torch.equal(stored.to(base.device), base)
