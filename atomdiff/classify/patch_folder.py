"""What `save_classifier` writes of a classifier that is not fully tuned, read again: adapter, head and metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import read_tensors
from atomdiff.utils.errors import UserError

HEAD_FILE = "head.safetensors"
METADATA_FILE = "classifier.json"
COMPONENT = "model"


@dataclass(frozen=True)
class PatchFolder:
    """A trained classifier, without its base."""

    path: Path
    base_model: str
    revision: str | None
    """Of a base on the Hub."""
    base_sha256: str
    classes: list[str]
    adapter: tuple[PeftConfig, dict[str, Tensor]] | None
    """Config and tensors; None where the head alone was trained."""
    head: dict[str, Tensor]
    """Tensors of the head and of batch norms' statistics, by their paths in the model without adapters."""


def read_patch(folder: Path) -> PatchFolder:
    """Read the folder `classifier` of a run, of any adapter but "full".

    Raises:
        UserError: It holds no classifier, one of full tuning, or a damaged one.
    """
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: a classifier of full tuning has weights of its own and shares none with a base: open it by "
            "load_classifier, or train one with another adapter"
        )
    if not (folder / METADATA_FILE).is_file():
        of_run = folder / "classifier"
        hint = f"; give {of_run}, the classifier of this run" if (of_run / METADATA_FILE).is_file() else ""
        raise UserError(f"{folder}: no classifier in it; expected {METADATA_FILE} or a model's config.json{hint}")
    metadata = _read_metadata(folder / METADATA_FILE)
    adapter = None
    if (folder / CONFIG_NAME).is_file():
        adapter = peft_folder.read(folder, [COMPONENT], COMPONENT)[0][COMPONENT]
    return PatchFolder(folder, adapter=adapter, head=read_tensors(folder / HEAD_FILE), **metadata)


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the folder again") from error
    expected = {"base_model", "revision", "base_sha256", "classes"}
    if not isinstance(metadata, dict) or not metadata.keys() >= expected:
        raise UserError(f"{file}: expected {', '.join(sorted(expected))} in it; copy the folder again")
    return {key: metadata[key] for key in expected}
