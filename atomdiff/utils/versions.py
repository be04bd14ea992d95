"""The versions that a result depends on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version


def versions() -> dict[str, str]:
    """The versions that a figure depends on, and the machine."""
    import torch

    names = ("atomdiff", "torch", "diffusers", "transformers", "accelerate", "peft")
    cores = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {**{name: version(name) for name in names}, "python": platform.python_version(), "machine": cores}


def package_versions() -> dict[str, str]:
    """The versions of atomdiff and of all packages that it computes with, as far as they are installed."""
    lines = [line for line in requires("atomdiff") or () if not re.search(r"extra == ['\"](?!gpu|optimizers)", line)]
    names = {"atomdiff", *(re.split(r"[\s<>=!~\[;]", line)[0] for line in lines)}
    found = {}
    for name in sorted(names):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def atomdiff_version() -> str:
    """Version of the installed atomdiff; empty where it is not installed."""
    try:
        return version("atomdiff")
    except PackageNotFoundError:
        return ""
