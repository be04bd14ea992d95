"""The versions that a result depends on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

from atomdiff.utils.machine import describe_processor


def versions() -> dict[str, str]:
    """The versions that a figure depends on, and the machine."""
    names = ("atomdiff", "torch", "diffusers", "transformers", "accelerate", "peft")
    found = {name: version(name) for name in names}
    return {**found, "python": platform.python_version(), "machine": describe_processor()}


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
