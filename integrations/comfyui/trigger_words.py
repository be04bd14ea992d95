"""Trigger words in ComfyUI's tokenizers: a word of a prompt stands for embeddings, as `embedding:NAME` does."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atomdiff.pipelines.prompt_syntax import split_at_words
from atomdiff.utils.errors import UserError

_MARK = "atoms-trigger-word-"  # in a name, which a number follows


class TriggerWords:
    """Part of a tokenizer class, before ComfyUI's own, which asks for embeddings by name.

    Every trigger word in a prompt becomes `embedding:` with a name that only this class knows.
    """

    trigger_words: dict[str, Tensor]
    """Trigger word -> embeddings (n, hidden)."""

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """As ComfyUI's; words count in any case, and not within other words or in `embedding:NAME`."""
        pieces = split_at_words(text, self.trigger_words, re.findall(r"embedding:\S+", text))
        numbers = {word: number for number, word in enumerate(self.trigger_words)}
        pieces[1::2] = [f" embedding:{_MARK}{numbers[word]} " for word in pieces[1::2]]
        return super().tokenize_with_weights("".join(pieces), *args, **kwargs)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str, *args: Any, **kwargs: Any) -> Any:
        """As ComfyUI's: the embeddings of a name, in newer versions the name, and the text behind it."""
        found = super()._try_get_embedding(embedding_name, *args, **kwargs)  # type: ignore[misc]
        name = embedding_name.split()[0]
        if not name.startswith(_MARK):
            return found
        return list(self.trigger_words.values())[int(name.removeprefix(_MARK))], *found[1:]


def add_trigger_words(tokenizer: Any, words: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Return a copy of a tokenizer that knows trigger words; the tokenizer itself is left as it is.

    Args:
        tokenizer: ComfyUI's, which has one for each text encoder as an attribute, such as `clip_l`.
        words: text encoder -> trigger word -> embeddings (n, hidden).

    Raises:
        UserError: a word is taken by a concept loaded before.
    """
    copied = copy.copy(tokenizer)
    for encoder, vectors in words.items():
        part = copy.copy(getattr(copied, encoder))
        if not isinstance(part, TriggerWords):
            part.__class__ = type("TokenizerWithTriggerWords", (TriggerWords, type(part)), {})
            part.trigger_words = {}
            part.embedding_directory = part.embedding_directory or []  # without one ComfyUI asks for no embedding
        known = {word.lower() for word in part.trigger_words}
        if taken := [word for word in vectors if word.lower() in known]:
            raise UserError(
                f"the trigger word {taken[0]!r} is taken by a concept that was loaded before: give this one another, "
                "in trigger_word"
            )
        part.trigger_words = {**part.trigger_words, **vectors}
        setattr(copied, encoder, part)
    return copied
