"""Where the files are that come with the project: the embedded base and its judge, the subjects, the configs."""

import os
from pathlib import Path

_INSTALLED = Path(__file__).parents[1] / "_assets"  # a wheel has them in the package, a checkout beside it
ASSETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2]
_FOLDERS = ("samples", "configs")


def find_asset(path: str) -> str:
    """Return a path as it is, unless nothing is there and it names a file that comes with the project.

    So `samples/toybox-sd` is the embedded base in any working directory.
    """
    parts = Path(path).parts
    if parts[:1] not in [(folder,) for folder in _FOLDERS] or os.path.exists(path):
        return path
    return str(ASSETS / path) if os.path.exists(ASSETS / path) else path
