"""Placeholder tokens in tokenizers: added, looked up, and taken out to the last attribute."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from atomdiff.pipelines.hooks import ReplacedMethod, restore_methods
from atomdiff.pipelines.vocabulary import VOCABULARY_OF, ExtendedTokenizer, Vocabulary


def token_ids(tokenizer: Any, word: str) -> list[int]:
    """The ids of a word as a tokenizer has it, without placeholder tokens of several vectors."""
    ids: list[int] = type(tokenizer)._encode_plus(tokenizer, word, add_special_tokens=False)["input_ids"]
    return ids


def known_id(tokenizer: Any, word: str) -> int | None:
    """The id of a word that is one known token; None: it is not."""
    ids = token_ids(tokenizer, word)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def ids_of(tokenizer: Any, tokens: Iterable[str]) -> list[int | None]:
    """The ids of tokens, and of the next one."""
    return [*(known_id(tokenizer, token) for token in tokens), len(tokenizer)]


def add_tokens(entry: ExtendedTokenizer, vocabulary: Vocabulary, tokens: Iterable[str]) -> None:
    """Make each a token of a tokenizer, unless it is one."""
    unknown = _unknown(entry.tokenizer, vocabulary, tokens)
    if not unknown:
        return
    if entry.original is None:
        # Tokenizers cannot forget a token, so what one was is set aside; others share the object itself.
        attributes = vars(entry.tokenizer)
        replaced = {name: value for name, value in attributes.items() if isinstance(value, ReplacedMethod)}
        entry.original, copied = dict(attributes), vars(copy.deepcopy(entry.tokenizer))
        attributes.clear()
        attributes.update(copied | replaced)
    _add(entry.tokenizer, unknown)
    entry.added.update(unknown)


def extended_copy(tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """A copy of a tokenizer that knows all placeholder tokens of a vocabulary."""
    copied = copy.deepcopy(tokenizer)
    _add(copied, _unknown(copied, vocabulary, vocabulary.tokens))
    return copied


def _unknown(tokenizer: Any, vocabulary: Vocabulary, tokens: Iterable[str]) -> list[str]:
    """The tokens that a tokenizer lacks; of several vectors also those that are pieces of its own."""
    known = tokenizer.added_tokens_encoder.keys()
    return [
        token
        for token in tokens
        if known_id(tokenizer, token) is None or (len(vocabulary.tokens[token].group) > 1 and token not in known)
    ]


def _add(tokenizer: Any, tokens: Iterable[str]) -> None:
    from transformers import AddedToken

    # Normalized, "mug" stays out of "<mug-style>"; but of "Mug" diffusers would not find further vectors then.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=word == word.lower()) for word in tokens])


def reset_tokenizer(entry: ExtendedTokenizer, vocabulary: Vocabulary) -> None:
    """Make a tokenizer what it was before the first placeholder token, with what others have added since."""
    if entry.original is None:
        return
    added = tokens_of_others(entry, vocabulary)
    attributes = vars(entry.tokenizer)
    attributes.clear()
    attributes.update(entry.original)
    entry.tokenizer.add_tokens([token for _, token in added])
    entry.original, entry.added = None, set()


def tokens_of_others(entry: ExtendedTokenizer, vocabulary: Vocabulary) -> list[tuple[int, Any]]:
    """Id and token of what others added to a tokenizer after the first placeholder token."""
    before = object.__new__(type(entry.tokenizer))
    vars(before).update(entry.original or {})
    known = {*before.added_tokens_encoder, *vocabulary.tokens}
    added = entry.tokenizer.added_tokens_decoder
    return [(number, added[number]) for number in sorted(added) if added[number].content not in known]


def original_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it was before its first placeholder token, in an object of its own."""
    vocabulary = VOCABULARY_OF.get(tokenizer)
    entries = [entry for entry in vocabulary.tokenizers if entry.tokenizer is tokenizer] if vocabulary else []
    original = next((entry.original for entry in entries if entry.original is not None), vars(tokenizer))
    restored = object.__new__(type(tokenizer))
    vars(restored).update(original)
    restore_methods(restored, list(vars(restored)))
    return restored
