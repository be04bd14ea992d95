"""Embeddings of placeholder tokens in text encoders: rows added, written, and taken out to every bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.pipelines.tokenizers import known_id, tokens_of_others
from atomdiff.pipelines.vocabulary import TABLE, EmbeddingTable, Vocabulary
from atomdiff.tuner import weight_access

_OLD_END = 2  # what old configs call the id of a prompt's end


def resize_table(model: Any, size: int) -> None:
    """Cut or lengthen a text encoder's embedding table, in the same parameter; new rows are the mean of the others."""
    table = model.get_input_embeddings()
    if model.config.vocab_size == table.num_embeddings:
        model.config.vocab_size = size
    with weight_access.loaded_in_module(table):
        rows = table.weight.data
        new = rows.mean(dim=0, keepdim=True).expand(max(size - len(rows), 0), -1)
        table.weight.data = torch.cat([rows[:size], new])
    table.num_embeddings = size


def add_rows(table: EmbeddingTable, tokenizer: Any, tokens: Iterable[str]) -> None:
    """Lengthen a table where the ids of tokens go beyond it."""
    last = max((known_id(tokenizer, token) or 0 for token in tokens), default=0)
    if last < len(table.embedding.weight):
        return
    if table.size is None:
        table.size, table.vocab_size = len(table.embedding.weight), table.encoder.config.vocab_size
    resize_table(table.encoder, len(tokenizer))
    # transformers takes the highest id of a prompt for its end, which an added token would be, where the config's id of
    # the end is the old one, such as SDXL's; so it gets the true one.
    if table.encoder.config.eos_token_id == _OLD_END != tokenizer.eos_token_id:
        table.old_end = True
        _set_end(table.encoder, tokenizer.eos_token_id)


def write_embeddings(vocabulary: Vocabulary, tokens: Iterable[str]) -> None:
    """Write the embeddings of tokens into the tables, and keep the rows of tokens that were known before."""
    tokens = list(tokens)
    for table in vocabulary.tables:
        with weight_access.loaded_in_module(table.embedding):
            tokenizer, rows = vocabulary.tokenizer_of(table), table.embedding.weight.data
            for token in tokens:
                vector, row = vocabulary.tokens[token].vectors.get(table.name), known_id(tokenizer, token)
                if vector is None or row is None or vector.shape != rows[row].shape:
                    continue
                if row < (len(rows) if table.size is None else table.size):
                    table.rows.setdefault(row, rows[row].clone())
                rows[row] = vector.to(rows)


def rows_of_others(vocabulary: Vocabulary, table: EmbeddingTable) -> tuple[list[Any], Tensor]:
    """The tokens that others added to a text encoder's tokenizer since, and their rows."""
    rows = table.embedding.weight.data
    entries = [entry for entry in vocabulary.tokenizers if entry.name == table.name and entry.original is not None]
    added = tokens_of_others(entries[0], vocabulary) if entries else []
    added = [(number, token) for number, token in added if number < len(rows)]
    with weight_access.loaded_in_module(table.embedding):
        return [token for _, token in added], table.embedding.weight.data[[number for number, _ in added]]


def reset_table(table: EmbeddingTable, tokenizer: Any, tokens: list[Any], vectors: Tensor) -> None:
    """Make a table what it was before the first placeholder token, with rows that others have added since.

    The tokenizer is reset already; `rows_of_others` gives `tokens` and their `vectors` (tokens, hidden).
    """
    with weight_access.loaded_in_module(table.embedding):
        rows = table.embedding.weight.data
        for row, values in table.rows.items():
            rows[row] = values.to(rows)
        if table.size is not None:
            size = max(table.size, len(tokenizer)) if tokens else table.size
            resize_table(table.encoder, size)
            table.encoder.config.vocab_size = table.vocab_size + size - table.size
        if tokens:
            ids = tokenizer.convert_tokens_to_ids([token.content for token in tokens])
            table.embedding.weight.data[ids] = vectors
    if table.old_end:
        _set_end(table.encoder, _OLD_END)
    table.size, table.rows, table.old_end = None, {}, False


def strip_table(encoder: Any) -> None:
    """Take the rows of placeholder tokens out of a copy of a text encoder that shares its tensors, which stay."""
    table = vars(encoder).pop(TABLE)
    embedding = encoder.get_input_embeddings()
    rows = embedding.weight.detach()[: table.size].clone()
    for row, values in table.rows.items():
        rows[row] = values.to(rows)
    embedding.weight, embedding.num_embeddings = nn.Parameter(rows, embedding.weight.requires_grad), len(rows)
    if table.size is not None:
        encoder.config.vocab_size = table.vocab_size
    if table.old_end:
        _set_end(encoder, _OLD_END)


def _set_end(model: Any, end: int) -> None:
    for module in (model.config, *model.modules()):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end
