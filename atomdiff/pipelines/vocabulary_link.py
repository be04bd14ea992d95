"""Let the text encoders and tokenizers of a pipeline know the same placeholder tokens, and those that share them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from atomdiff.pipelines.caller import find_caller
from atomdiff.pipelines.embedding_tables import add_rows, reset_table, rows_of_others, strip_table, write_embeddings
from atomdiff.pipelines.hooks import replace_methods, restore_methods
from atomdiff.pipelines.prompt_syntax import split_at_words
from atomdiff.pipelines.tokenizers import add_tokens, extended_copy, ids_of, reset_tokenizer, token_ids
from atomdiff.pipelines.vocabulary import (
    TABLE,
    VOCABULARY_OF,
    EmbeddingTable,
    ExtendedTokenizer,
    Vocabulary,
    text_encoders,
    vocabularies,
)
from atomdiff.utils.errors import UserError

LOCK = threading.RLock()  # of tokenizers, which hold how they pad, and of their placeholder tokens


def check_linkable(pipe: Any) -> None:
    """Refuse parts that know different placeholder tokens, and tokenizers that would give a token another id."""
    linked = vocabularies(pipe)
    if len(linked) > 1:
        words = " and ".join(", ".join(map(repr, vocabulary.tokens)) for vocabulary in linked)
        raise UserError(
            f"the text encoders and tokenizers of this {type(pipe).__name__} know different trigger words, {words}, "
            "from pipelines that they were in before: unload the concepts there, or take tokenizer and text encoder "
            "from one pipeline"
        )
    for vocabulary in linked:
        for name, _, tokenizer in text_encoders(pipe):
            extended = [entry.tokenizer for entry in vocabulary.tokenizers if entry.name == name]
            if tokenizer not in extended:
                tokenizer = extended_copy(tokenizer, vocabulary)
            if any(ids_of(other, vocabulary.tokens) != ids_of(tokenizer, vocabulary.tokens) for other in extended):
                raise UserError(
                    f"{name} knows trigger words by another tokenizer, which gives them other ids than that of this "
                    f"{type(pipe).__name__}: let pipelines that share a text encoder share the tokenizer, too"
                )


def link(pipe: Any) -> Vocabulary:
    """Let all text encoders and tokenizers of a pipeline know the tokens that one of them knows."""
    check_linkable(pipe)
    vocabulary = next(iter(vocabularies(pipe)), None) or Vocabulary()
    for name, encoder, tokenizer in text_encoders(pipe):
        known = any(entry.tokenizer is tokenizer and entry.name == name for entry in vocabulary.tokenizers)
        if not known:
            vocabulary.tokenizers.append(ExtendedTokenizer(name, tokenizer))
            VOCABULARY_OF[tokenizer] = vocabulary
            replace_methods(tokenizer, _TOKENIZER_METHODS)
        if TABLE not in vars(encoder):
            vars(encoder)[TABLE] = EmbeddingTable(vocabulary, name, encoder)
            encoder.register_forward_pre_hook(_check_tokenizer, with_kwargs=True)
        elif known:
            continue
        add_all(vocabulary)
    return vocabulary


def add_all(vocabulary: Vocabulary) -> None:
    """Let all tokenizers and tables have all tokens."""
    make_tokens(vocabulary, vocabulary.tokens)
    write_embeddings(vocabulary, vocabulary.tokens)


def make_tokens(vocabulary: Vocabulary, tokens: Iterable[str]) -> None:
    """Make each a token of every tokenizer, with a row in every table."""
    tokens = list(tokens)
    for entry in vocabulary.tokenizers:
        add_tokens(entry, vocabulary, tokens)
    for table in vocabulary.tables:
        add_rows(table, vocabulary.tokenizer_of(table), tokens)


def take_tokens_out(vocabulary: Vocabulary, tokens: Collection[str]) -> None:
    """Take tokens out of tokenizers and tables; a vocabulary that is left without any leaves them, too."""
    added_since = [(table, *rows_of_others(vocabulary, table)) for table in vocabulary.tables]
    for entry in vocabulary.tokenizers:
        reset_tokenizer(entry, vocabulary)
    for table, added, vectors in added_since:
        reset_table(table, vocabulary.tokenizer_of(table), added, vectors)
    vocabulary.tokens = {token: entry for token, entry in vocabulary.tokens.items() if token not in tokens}
    for token in vocabulary.tokens.values():
        token.group = [each for each in token.group if each not in tokens]
    if vocabulary.tokens:
        add_all(vocabulary)
        return
    for table in vocabulary.tables:
        del vars(table.encoder)[TABLE]
        _remove_check(table.encoder)
    for entry in vocabulary.tokenizers:
        VOCABULARY_OF.pop(entry.tokenizer, None)
        restore_methods(entry.tokenizer, _TOKENIZER_METHODS)
    vocabulary.tables.clear()
    vocabulary.tokenizers.clear()


def strip_tokens(encoder: Any) -> None:
    """Take the placeholder tokens out of a copy of a text encoder that shares its tensors; they are left alone."""
    if TABLE in vars(encoder):
        strip_table(encoder)
        _remove_check(encoder)


def _remove_check(encoder: Any) -> None:
    hooks = encoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _check_tokenizer]:
        del hooks[key]
        encoder._forward_pre_hooks_with_kwargs.pop(key, None)


def _encode(tokenizer: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
    """As the tokenizer's own, in which all calls end; the pipeline that calls learns tokens that it does not know."""
    with LOCK:
        if not kwargs.get("is_split_into_words"):
            text = (
                [_with_tokens(tokenizer, each) for each in text]
                if isinstance(text, list)
                else _with_tokens(tokenizer, text)
            )
        return type(tokenizer)._encode_plus(tokenizer, text, *args, **kwargs)


def _tokenize(tokenizer: Any, *args: Any, **kwargs: Any) -> list[str]:
    """As the tokenizer's own; a word of several vectors is one token, "sks sks_1", which diffusers leaves alone.

    Diffusers would write "sks" out itself otherwise, also within other words.
    """
    tokens = type(tokenizer).tokenize(tokenizer, *args, **kwargs)
    vocabulary = VOCABULARY_OF.get(tokenizer)
    for entry in vocabulary.tokens.values() if vocabulary else ():
        count = len(entry.group)
        for start in range(len(tokens) - count, -1, -1) if count > 1 else ():
            if tokens[start : start + count] == entry.group:
                tokens[start : start + count] = [" ".join(entry.group)]
    return tokens  # type: ignore[no-any-return]


_TOKENIZER_METHODS: dict[str, Any] = {"_encode_plus": _encode, "tokenize": _tokenize}


def _with_tokens(tokenizer: Any, text: Any) -> Any:
    """A prompt with its trigger words as placeholder tokens: "SKS mug" as "sks sks_1 mug"."""
    caller = find_caller(tokenizer)
    known = vocabularies(caller.pipe) if caller else [VOCABULARY_OF[tokenizer]] if tokenizer in VOCABULARY_OF else []
    words = {" ".join(entry.group): entry for vocabulary in known for entry in vocabulary.tokens.values()}
    words |= {word: entry for vocabulary in known for word, entry in vocabulary.tokens.items()}
    if not words or not isinstance(text, str):
        return text
    parts = split_at_words(text, words, tokenizer.added_tokens_encoder)
    if len(parts) == 1:
        return text
    if caller:
        link(caller.pipe)
    parts[1::2] = [" ".join(words[word].group) for word in parts[1::2]]
    return " ".join(part.strip() for part in parts).strip()


def _check_tokenizer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse prompts whose trigger words a tokenizer that does not know them has taken apart; it learns them then."""
    if torch.compiler.is_compiling() or (caller := find_caller(model)) is None:
        return
    vocabulary = vars(model)[TABLE].vocabulary
    known = [entry.tokenizer for entry in vocabulary.tokenizers]
    for tokenizer in [tokenizer for _, encoder, tokenizer in text_encoders(caller.pipe) if encoder is model]:
        if any(tokenizer is each for each in known):
            continue
        pieces = {word: token_ids(tokenizer, word) for word in vocabulary.tokens}
        with LOCK:
            link(caller.pipe)
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows = ids.tolist() if isinstance(ids, Tensor) and ids.ndim > 1 else []
        for word in [word for word in pieces if pieces[word] != token_ids(tokenizer, word)]:
            if any(_contains(row, pieces[word]) for row in rows):
                raise UserError(
                    f"the tokenizer of this {type(caller.pipe).__name__} did not know the trigger word {word!r} of its "
                    "text encoder, which another pipeline added, and split it: it knows it now; call again"
                )


def _contains(ids: list[int], pieces: list[int]) -> bool:
    return any(ids[start : start + len(pieces)] == pieces for start in range(len(ids)))
