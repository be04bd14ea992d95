"""Trigger words in files: the keys of their embeddings, and how many there may be."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from torch import Tensor

from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_TRIGGER_WORD_LENGTH, MAX_TRIGGER_WORDS, list_some


def check_words(path: str | os.PathLike[str], words: Collection[str]) -> None:
    """Check that the trigger words of a concept file are few and short: each costs memory and time in a tokenizer.

    Raises:
        UserError: they are not.
    """
    if len(words) > MAX_TRIGGER_WORDS or any(len(word) > MAX_TRIGGER_WORD_LENGTH for word in words):
        raise UserError(
            f"{path}: {len(words)} trigger words ({list_some(sorted(words))}); a concept has at most "
            f"{MAX_TRIGGER_WORDS}, of at most {MAX_TRIGGER_WORD_LENGTH} characters"
        )


def token_tensors(tokens: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Embeddings by word and text encoder -> by key: `token.sks`, of a second encoder `token.sks.text_encoder_2`."""
    return {
        f"token.{word}" if encoder == "text_encoder" else f"token.{word}.{encoder}": vector
        for word, vectors in tokens.items()
        for encoder, vector in vectors.items()
    }


def split_token_key(key: str) -> tuple[str, str]:
    """The word and the text encoder of a key of `token_tensors`."""
    name = key.removeprefix("token.")
    word, _, encoder = name.rpartition(".text_encoder_")
    return (word, f"text_encoder_{encoder}") if word and encoder.isdigit() else (name, "text_encoder")
