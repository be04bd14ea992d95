"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """The versions that a figure depends on, and the machine."""
    import torch

    names = ("atomdiff", "torch", "diffusers", "transformers", "accelerate", "peft")
    cores = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {**{name: version(name) for name in names}, "python": platform.python_version(), "machine": cores}


def atomdiff_version() -> str:
    """Version of the installed atomdiff; empty where it is not installed."""
    try:
        return version("atomdiff")
    except PackageNotFoundError:
        return ""
