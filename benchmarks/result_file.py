"""Result files of benchmarks: figures, with all that they depend on."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from atomdiff.utils.atomic import write_json
from atomdiff.utils.versions import versions


def command_line(benchmark: str, config: Any, ignore: tuple[str, ...] = ("output",)) -> str:
    """Return the command that a benchmark was run with: its options that are not the defaults.

    Args:
        benchmark: its module in this package.
        config: its options, a dataclass.
        ignore: options that say only where files go.
    """
    words = [f"python -m benchmarks.{benchmark}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ignore:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{field.name} {shlex.join(map(str, values))}")
    return " ".join(words)


def write_result(
    path: str | Path, command: str, figures: Mapping[str, Any], machine: str | None = None, **more: Any
) -> None:
    """Write a result file, and print its figures.

    Args:
        path: the file.
        command: what was run.
        figures: by name.
        machine: what computed; by default the processor and its threads.
        **more: further entries of the file.
    """
    found = versions()
    result = {
        "machine": machine or found["machine"],
        "versions": found,
        "date": date.today().isoformat(),
        "command": command,
        "figures": figures,
        **more,
    }
    write_json(path, result)
    print(json.dumps(figures, indent=1))
