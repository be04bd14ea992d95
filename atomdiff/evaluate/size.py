"""Size: what a concept costs to keep."""

import math
import os
from pathlib import Path

from safetensors import safe_open

from atomdiff.bases.find import find_base
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compact_layers import TABLE


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a file, or of all files in a folder and its subfolders.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


def num_trainable_parameters(path: str | os.PathLike[str]) -> int:
    """Return the number of trained parameters of a stored concept, trigger words included.

    What files carry beside them was not: atoms, tables of layers, random projections, indices. Of a fully tuned
    pipeline the denoiser counts, and no trigger word.

    Args:
        path: a concept file, a folder written by PEFT, or a pipeline folder.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        UserError: the folder holds no concept.
    """
    path = Path(path)
    files = _files(path)
    if (path / "model_index.json").is_file():
        files = _files(path / find_base({folder.name: folder for folder in path.iterdir()}).denoiser)
    elif path.is_dir():
        adapters, tokens, _ = peft_folder.read(path, None, denoiser="")
        return peft_folder.count_trained(adapters, tokens)
    count = 0
    for file in files:
        if file == path or file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                keys = [key for key in tensors.keys() if not key.endswith("_basis") and key != TABLE]  # noqa: SIM118
                shapes = [tensors.get_slice(key).get_shape() for key in keys]
                count += sum(math.prod(shape) for shape in shapes)
    return count


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"found nothing at {path}: check the path")
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
