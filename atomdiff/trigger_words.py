"""Trigger words: a word of one token whose embedding is part of a concept, put into a pipeline and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.errors import UserError


@dataclass
class TriggerWord:
    """A word in use, with its embedding per text encoder (none until one is set)."""

    owner: str | None = None
    """The adapter that brought it; None where it was added by hand."""
    vectors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Vocabulary:
    """The trigger words of a pipeline, and what it takes to forget them."""

    words: dict[str, TriggerWord] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)  # as they were before the first added word
    table_sizes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # overwritten rows of the tables


def trigger_words(pipe: Any) -> dict[str, TriggerWord]:
    """The trigger words of a pipeline."""
    return dict(_vocabulary(pipe).words)


def add_trigger_word(pipe: Any, word: str, owner: str | None = None) -> int:
    """Make a word one token for every text encoder of a pipeline.

    A word that is one known token already keeps its id and embedding. Any other is added: the pipeline gets a copy of
    its tokenizer that knows it, and the embedding table a row, the mean of the table until an embedding is set.

    Args:
        pipe: the pipeline.
        word: without blanks.
        owner: the adapter that it belongs to.

    Returns:
        The token's id in `pipe.tokenizer`; `token_id(pipe, word, text_encoder)` gives it for any text encoder.

    Raises:
        UserError: the word has blanks, is a trigger word already, or the pipeline has no text encoder.
    """
    check_free(pipe, word)
    encoders = [encoder for encoder, *_ in _text_encoders(pipe)]
    if not encoders:
        raise UserError(f"{type(pipe).__name__} has no text encoder with a tokenizer to teach {word!r}")
    _vocabulary(pipe).words[word] = TriggerWord(owner)
    for encoder in encoders:
        _make_token(pipe, encoder, word)
    return token_id(pipe, word, encoders[0])


def token_id(pipe: Any, word: str, text_encoder: str = "text_encoder") -> int:
    """The id of a trigger word for one text encoder.

    Raises:
        UserError: the word is not one token there.
    """
    for encoder, tokenizer, _ in _text_encoders(pipe):
        if encoder == text_encoder and (known := _known_id(tokenizer, word)) is not None:
            return known
    raise UserError(f"{word!r} is not one token of {text_encoder}: call add_trigger_word(pipe, {word!r}) first")


def set_trigger_embedding(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Write a trigger word's embedding into the tables of the text encoders; the old rows are kept for removal.

    Args:
        pipe: the pipeline.
        word: added before.
        vectors: text encoder -> embedding (hidden,).

    Raises:
        UserError: the word was not added, or a vector does not fit a text encoder; nothing is changed.
    """
    vocabulary = _vocabulary(pipe)
    if word not in vocabulary.words:
        raise UserError(f"{word!r} is not a trigger word yet: call add_trigger_word(pipe, {word!r}) first")
    check_vectors(pipe, word, vectors)
    for encoder, _, table in _text_encoders(pipe):
        if encoder not in vectors:
            continue
        row = token_id(pipe, word, encoder)
        if row < vocabulary.table_sizes.get(encoder, len(table.weight)):
            vocabulary.rows.setdefault(encoder, {}).setdefault(row, table.weight.data[row].clone())
        vocabulary.words[word].vectors[encoder] = vectors[encoder].detach().clone()
        table.weight.data[row] = vectors[encoder].detach().to(table.weight)


def remove_trigger_word(pipe: Any, word: str) -> None:
    """Take a trigger word out: tokenizers and embedding tables are as if it had never been added, to every bit.

    Ids of words that were added after it change.

    Raises:
        UserError: the word is not a trigger word.
    """
    vocabulary = _vocabulary(pipe)
    if word not in vocabulary.words:
        raise UserError(f"{word!r} is not a trigger word; there are: {', '.join(vocabulary.words) or 'none'}")
    _reset(pipe, vocabulary)
    kept = {other: entry for other, entry in vocabulary.words.items() if other != word}
    vocabulary.words.clear()
    for other, entry in kept.items():
        add_trigger_word(pipe, other, entry.owner)
        set_trigger_embedding(pipe, other, entry.vectors)


def check_free(pipe: Any, word: str) -> None:
    """Check that a word can become a trigger word.

    Raises:
        UserError: it has blanks, or is one already.
    """
    if not word or word.split() != [word]:
        raise UserError(f"{word!r} cannot be a trigger word: it must be one word without blanks")
    if word in _vocabulary(pipe).words:
        owner = _vocabulary(pipe).words[word].owner
        raise UserError(
            f"the trigger word {word!r} is taken{f' by {owner!r}' if owner else ''}: "
            "load with trigger_word='another word', or unload the other concept first"
        )


def check_vectors(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Check that embeddings fit the text encoders of a pipeline.

    Raises:
        UserError: a text encoder is missing, or its embeddings have another size.
    """
    sizes = {encoder: table.embedding_dim for encoder, _, table in _text_encoders(pipe)}
    for encoder, vector in vectors.items():
        if encoder not in sizes:
            raise UserError(f"the word {word!r} has an embedding for {encoder}, which this pipeline does not have")
        if vector.shape != (sizes[encoder],):
            raise UserError(
                f"the embedding of {word!r} has shape {tuple(vector.shape)}, but {encoder} takes ({sizes[encoder]},): "
                "the concept was made for another base"
            )


def _vocabulary(pipe: Any) -> _Vocabulary:
    if not hasattr(pipe, "_atomdiff_vocabulary"):
        pipe._atomdiff_vocabulary = _Vocabulary()
    found: _Vocabulary = pipe._atomdiff_vocabulary
    return found


def _text_encoders(pipe: Any) -> Iterator[tuple[str, Any, nn.Embedding]]:
    """Name, tokenizer and embedding table of every text encoder that has a tokenizer."""
    for name, encoder in pipe.components.items():
        tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and encoder is not None and tokenizer is not None:
            yield name, tokenizer, encoder.get_input_embeddings()


def _known_id(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer.encode(word, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _make_token(pipe: Any, encoder: str, word: str) -> None:
    vocabulary = _vocabulary(pipe)
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer = getattr(pipe, name)
    if _known_id(tokenizer, word) is not None:
        return
    from transformers import AddedToken

    if encoder not in vocabulary.tokenizers:
        # Tokenizers cannot forget a word, so the original is set aside.
        vocabulary.tokenizers[encoder] = tokenizer
        tokenizer = copy.deepcopy(tokenizer)
        setattr(pipe, name, tokenizer)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False)])
    model = getattr(pipe, encoder)
    table = model.get_input_embeddings()
    missing = len(tokenizer) - len(table.weight)
    if missing > 0:
        vocabulary.table_sizes.setdefault(encoder, len(table.weight))
        mean = table.weight.data.mean(dim=0, keepdim=True)
        _set_table(model, torch.cat([table.weight.data, mean.expand(missing, -1)]))


def _set_table(model: Any, rows: Tensor) -> None:
    """Give a text encoder another embedding table, in the same parameter."""
    table = model.get_input_embeddings()
    if model.config.vocab_size == table.num_embeddings:
        model.config.vocab_size = len(rows)
    table.weight.data = rows
    table.num_embeddings = len(rows)


def _reset(pipe: Any, vocabulary: _Vocabulary) -> None:
    """Tokenizers and tables as they were before the first trigger word."""
    for encoder, tokenizer in vocabulary.tokenizers.items():
        setattr(pipe, encoder.replace("text_encoder", "tokenizer"), tokenizer)
    for encoder, rows in vocabulary.rows.items():
        table = getattr(pipe, encoder).get_input_embeddings()
        for row, values in rows.items():
            table.weight.data[row] = values.to(table.weight)
    for encoder, size in vocabulary.table_sizes.items():
        model = getattr(pipe, encoder)
        _set_table(model, model.get_input_embeddings().weight.data[:size].clone())
    vocabulary.tokenizers, vocabulary.rows, vocabulary.table_sizes = {}, {}, {}
