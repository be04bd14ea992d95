"""Concept files in ComfyUI's folders: `models/atoms`, and beside the LoRAs."""

from __future__ import annotations

import os

import folder_paths
from torch import Tensor

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, ConceptFile
from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.utils.errors import UserError

FOLDER = "atoms"


def add_folder() -> None:
    """Let ComfyUI know `models/atoms`, beside what its `extra_model_paths.yaml` says."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def concept_names() -> list[str]:
    """Return the names of all concept files; among LoRAs they are told by their suffix."""
    own = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
    among_loras = [name for name in folder_paths.get_filename_list("loras") if name.endswith(CONCEPT_SUFFIX)]
    return list(dict.fromkeys(own + among_loras))


def concept_path(name: str) -> str:
    """Return the path of a concept file.

    Raises:
        UserError: there is none of this name.
    """
    path = folder_paths.get_full_path(FOLDER, name) or folder_paths.get_full_path("loras", name)
    if path is None:
        raise UserError(f"there is no {name!r} in ComfyUI's models/{FOLDER} or models/loras: put it there")
    return str(path)


def trigger_phrase(concept: ConceptFile, tokens: dict[str, dict[str, Tensor]]) -> str:
    """Return what to write in a prompt: the phrase of the file, with the trigger words that `tokens` has instead."""
    words = list(group_placeholder_tokens(tokens))
    renamed = dict(zip(group_placeholder_tokens(concept.tokens), words, strict=True))
    return replace_words(concept.trigger_phrase, renamed) or ", ".join(words)
