"""What a file or a folder says of the run that it was trained in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomdiff.utils.untrusted import parse_json


def training_record(path: Path) -> Mapping[str, Any] | None:
    """Return what a concept's file, or a folder written by PEFT, says of its run; only headers are read.

    None: nothing is known of its training.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / SAFETENSORS_WEIGHTS_NAME if path.is_dir() else path, framework="pt") as file:
            return parse_json((file.metadata() or {})["training"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None


def trained_class(path: Path) -> str | None:
    """Return the class of the subject that a concept was trained on, in the base's words; None: it is not known."""
    config = (training_record(path) or {}).get("config")
    found = config.get("class_name") if isinstance(config, dict) else None
    return found if isinstance(found, str) and found.strip() else None
