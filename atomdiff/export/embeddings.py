"""Token embeddings of trigger words in files that other programs read."""

from __future__ import annotations

import re
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.bases.find import base_of_architecture, find_base
from atomdiff.export.tensor_file import save_tensors, to_file_dtype
from atomdiff.pipelines.loaded_concepts import list_atoms
from atomdiff.pipelines.placeholder_tokens import token_id, tokens_in
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.sampling.concept_source import ConceptSource
from atomdiff.tuner.checks import check_in_reach
from atomdiff.tuner.weight_access import read

TokenEmbeddings = dict[str, dict[str, Tensor]]  # trigger word -> key in a file -> embeddings (n, hidden)


def embeddings_without_base(concepts: list[ConceptSource]) -> TokenEmbeddings | None:
    """Return the token embeddings of concepts that are nothing else, which need no base; None: some have layers."""
    words: TokenEmbeddings = {}
    for concept in concepts:
        contents = concept.read() if concept.read is not None else None
        if contents is None or contents.layers:
            return None
        base = base_of_architecture(contents.modelspec.get("architecture", ""))
        if base is None or any(sorted(vectors) != sorted(base.text_encoders) for vectors in contents.tokens.values()):
            return None
        groups = group_placeholder_tokens(contents.tokens)
        if groups.keys() & words.keys():
            return None
        for word, group in groups.items():
            words[word] = {
                name: torch.stack([contents.tokens[token][encoder] for token in group])
                for encoder, name in base.embedding_names.items()
            }
    return words


def active_embeddings(pipe: Any) -> TokenEmbeddings:
    """Return the token embeddings of the active concepts."""
    inactive = {concept.name for concept in list_atoms(pipe) if concept.layers and not concept.active}
    by_owner: dict[str | None, list[str]] = {}
    for token, entry in tokens_in(pipe).items():
        if entry.vectors and entry.owner not in inactive:
            by_owner.setdefault(entry.owner, []).append(token)
    groups = [group for tokens in by_owner.values() for group in group_placeholder_tokens(tokens).values()]
    names = find_base(pipe.components).embedding_names
    encoders = [encoder for encoder in names if pipe.components.get(encoder) is not None]
    return {
        group[0]: {
            names[encoder]: torch.stack([_embedding(pipe, token, encoder) for token in group]) for encoder in encoders
        }
        for group in groups
    }


def _embedding(pipe: Any, token: str, encoder: str) -> Tensor:
    """Return a placeholder token's embedding (hidden,), not rounded to the dtype of the table where it was set."""
    if (vector := tokens_in(pipe)[token].vectors.get(encoder)) is not None:
        return vector
    model = getattr(pipe, encoder)
    check_in_reach(model)
    return read(model.get_input_embeddings())[token_id(pipe, token, encoder)].detach().float()


def save_embeddings(folder: Path, prefix: str, words: TokenEmbeddings, dtype: torch.dtype) -> dict[str, Path]:
    """Write a file for each trigger word, with a name that every system allows; return word -> file."""
    files: dict[str, Path] = {}
    for word, rows in words.items():
        name, taken = prefix + re.sub(r"[^\w.-]", "_", word), {file.stem.lower() for file in files.values()}
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        files[word] = folder / f"{next(each for each in names if each.lower() not in taken)}.safetensors"
        save_tensors(files[word], {key: to_file_dtype(row, dtype, word) for key, row in rows.items()}, {})
    return files
