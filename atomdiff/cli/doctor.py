"""What a bug report needs to know of a machine: versions, device, precision, optional packages, memory, disk, caches.

Every line is found by itself, so that a broken package spoils only its own.
"""

import importlib
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from atomdiff.training.config.fleet import FleetConfig
from atomdiff.training.config.optimizer import OPTIMIZERS
from atomdiff.training.config.tune import TuneConfig
from atomdiff.utils.assets import ASSETS
from atomdiff.utils.fields import NeedsPackage, marked_fields
from atomdiff.utils.machine import describe_device, describe_processor

_PARTS = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "huggingface-hub")
_OPTIONAL = {
    needed.package: needed.extra
    for needed in (
        *marked_fields(TuneConfig, NeedsPackage).values(),
        *marked_fields(FleetConfig, NeedsPackage).values(),
        *(spec.needs for spec in OPTIMIZERS.values()),
    )
    if needed
}
_GB = 1e9


@dataclass(frozen=True)
class DoctorConfig:
    """Show what a bug report needs: versions, device, precision, optional packages, memory, disk, caches."""


def examine() -> str:
    """Return the report, a line for each thing; what cannot be found out says so."""
    lines: dict[str, Callable[[], str]] = {
        "atomdiff": lambda: f"{version('atomdiff')} in {Path(__file__).parents[1]}",
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": lambda: f"{platform.platform()}, {platform.machine()}",
        **{name: lambda name=name: _package(name) for name in _PARTS},  # type: ignore[misc]
        "processor": describe_processor,
        "device": describe_device,
        "precision": _precision,
        **{name: lambda name=name, extra=extra: _optional(name, extra) for name, extra in _OPTIONAL.items()},  # type: ignore[misc]
        "memory": _memory,
        "disk": lambda: f"{shutil.disk_usage('.').free / _GB:.1f} GB free in {Path.cwd()}",
        "Hub cache": _hub_cache,
        "embedded base": lambda: _folder(ASSETS / "samples" / "toybox-sd"),
    }
    return "\n".join(f"{name:<16}{_tried(line)}" for name, line in lines.items())


def _tried(line: Callable[[], str]) -> str:
    try:
        return line()
    except BaseException as error:  # broken packages raise, or end the program, as they like
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"unknown ({_short(error)})"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _package(name: str) -> str:
    """Return a package's version, whether that is one that atomdiff asks for, and whether it can be imported."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return "missing; pip install atomdiff"
    try:
        importlib.import_module(name.replace("-", "_"))
    except BaseException as error:
        return f"{found}, broken ({_short(error)})"
    wanted = next((line for line in requires("atomdiff") or () if re.split(r"[\s<>=!~\[;]", line)[0] == name), None)
    from packaging.requirements import Requirement

    if wanted is None or Requirement(wanted).specifier.contains(found, prereleases=True):
        return found
    return f"{found}, but atomdiff expects {wanted.split(';')[0].strip()}"


def _optional(name: str, extra: str) -> str:
    found = _package(name)
    return found if not found.startswith("missing") else f'missing; pip install "atomdiff[{extra}]"'


def _precision() -> str:
    from atomdiff.utils.precision import choose_precision, compute_device

    return str(choose_precision(None, compute_device()))


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / _GB:.1f} GB, {memory.available / _GB:.1f} GB of them available"


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return _folder(Path(HF_HUB_CACHE))


def _folder(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}, not there"
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return f"{folder}, {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
