"""The state of a git repository that a program's files are in."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_SECONDS = 20  # for a command of git


@cache
def git_state(file: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that tracks a file, and whether tracked files differ from it.

    It is looked up once in a process, whose code stays that of its start.

    Returns:
        `commit` (40 hexadecimal digits) and `dirty`; None for a file that is in no repository or not tracked by it, and
        where git is missing.
    """
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _git(file.parent, "rev-parse", "HEAD").strip()
        changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed.strip())}


def _git(folder: Path, *command: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # nothing is written in the repository
    done = subprocess.run(
        ["git", *command], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=_SECONDS
    )
    return done.stdout
