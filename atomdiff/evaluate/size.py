"""Size: what a concept costs to keep."""

import math
import os
from pathlib import Path

from safetensors import safe_open

from atomdiff.bases.find import find_base


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a file, or of all files in a folder and its subfolders.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


def num_trainable_parameters(path: str | os.PathLike[str]) -> int:
    """Return the number of trained parameters of a stored concept, trigger words included.

    Atoms, which concept files carry beside the deltas, were not. Of a fully tuned pipeline the denoiser counts, and no
    trigger word.

    Args:
        path: a concept file, a folder written by PEFT, or a pipeline folder.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        path /= find_base({folder.name: folder for folder in path.iterdir()}).denoiser
    count = 0
    for file in _files(path):
        if file == path or file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys() if not key.endswith("_basis")]
                count += sum(math.prod(shape) for shape in shapes)
    return count


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"found nothing at {path}: check the path")
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
