"""Trigger words: a word of one token whose embedding is part of a concept, put into a pipeline and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.errors import UserError
from atomdiff.prompt_tags import split_at_words
from atomdiff.vector_words import group_words

_OLD_END = 2


@dataclass
class TriggerWord:
    """A word in use, with its embedding per text encoder (none until one is set)."""

    owner: str | None = None
    """The adapter that brought it; None where it was added by hand."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    group: list[str] = field(default_factory=list)
    """What it is written as for a tokenizer: itself, and the words of its further vectors, see `words_of`."""


@dataclass
class _Vocabulary:
    """The trigger words of a pipeline, and what it takes to forget them."""

    words: dict[str, TriggerWord] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)  # as they were before the first added word
    table_sizes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # overwritten rows of the tables
    ends: set[str] = field(default_factory=set)  # text encoders that look for the end of a prompt by another id


def trigger_words(pipe: Any) -> dict[str, TriggerWord]:
    """The trigger words of a pipeline."""
    return dict(_vocabulary(pipe).words) if hasattr(pipe, "_atomdiff_vocabulary") else {}


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
        UserError: the word cannot be one, or the pipeline has no text encoder.
    """
    add_trigger_words(pipe, [word], owner)
    return token_id(pipe, word, next(encoder for encoder, *_ in _text_encoders(pipe)))


def add_trigger_words(pipe: Any, words: Iterable[str], owner: str | None = None) -> None:
    """Add several words; the embedding tables are copied once for all of them.

    Where "sks_1" is added with "sks", diffusers pipelines take "sks" in a prompt for "sks sks_1", and so on with
    "sks_2", ...: one trigger word of several vectors. Then "sks" is added even if it is a known token. In this pipeline
    a word counts in any case, as words that CLIP knows do, and only where it is a word of its own: not "mu" in "mug".

    Args:
        pipe: the pipeline.
        words: each once; `add_trigger_word` says what becomes of them.
        owner: the adapter that they belong to.

    Raises:
        UserError: as for `check_addable`; nothing is changed.
    """
    words = list(words)
    check_addable(pipe, words)
    if not words:
        return
    vocabulary, groups = _vocabulary(pipe), group_words(words)
    vocabulary.words.update({word: TriggerWord(owner, group=groups.get(word, [word])) for word in words})
    if hasattr(pipe, "maybe_convert_prompt"):
        pipe.maybe_convert_prompt = partial(_convert_prompt, vocabulary)
    _make_tokens(pipe, words)


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
    remove_trigger_words(pipe, [word])


def remove_trigger_words(pipe: Any, words: Iterable[str]) -> None:
    """Take several words out; the embedding tables are copied once for all of them.

    Args:
        pipe: the pipeline.
        words: `remove_trigger_word` says what becomes of them.

    Raises:
        UserError: a word is not a trigger word; nothing is changed.
    """
    there, gone = trigger_words(pipe), set(words)
    for word in gone - there.keys():
        raise UserError(f"{word!r} is not a trigger word; there are: {', '.join(there) or 'none'}")
    if not gone:
        return
    vocabulary = _vocabulary(pipe)
    _reset(pipe, vocabulary)
    vocabulary.words = {word: entry for word, entry in vocabulary.words.items() if word not in gone}
    if not vocabulary.words:
        del pipe._atomdiff_vocabulary
        pipe.__dict__.pop("maybe_convert_prompt", None)
        return
    for entry in vocabulary.words.values():
        entry.group = [each for each in entry.group if each not in gone]
    _make_tokens(pipe, vocabulary.words)
    for word, entry in vocabulary.words.items():
        set_trigger_embedding(pipe, word, entry.vectors)


def check_addable(pipe: Any, words: Sequence[str]) -> None:
    """Check that words can be added together.

    Raises:
        UserError: one cannot be a trigger word, two differ in case only, or the pipeline has no text encoder.
    """
    for word in words:
        _check_free(pipe, word)
    if words and not any(_text_encoders(pipe)):
        raise UserError(f"{type(pipe).__name__} has no text encoder with a tokenizer to teach {words[0]!r}")
    spellings = {word.lower(): word for word in words}
    for word in words:
        if (other := spellings[word.lower()]) != word:
            found = f"the trigger words {word!r} and {other!r} differ in case only, which CLIP does not see"
            raise UserError(f"{found}: give each a word of its own")
    several = {first for first, group in group_words(words).items() if len(group) > 1}
    for encoder, tokenizer, _ in _text_encoders(pipe):
        for word in words:
            new = word in several or _known_id(tokenizer, word) is None
            piece = tokenizer.convert_tokens_to_ids(word) not in (None, tokenizer.unk_token_id)
            if new and piece and word not in tokenizer.added_tokens_encoder:
                raise UserError(
                    f"{word!r} cannot be a trigger word{' of several vectors' if word in several else ''}: {encoder} "
                    "makes other words of it, which would change with it; load with trigger_word='another word', or "
                    "train with another one"
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


def fitting_tokens(
    pipe: Any, tokens: Mapping[str, Mapping[str, Tensor]], allow_mismatch: bool = False
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The embeddings of trigger words that a pipeline has text encoders for.

    Args:
        pipe: the pipeline.
        tokens: trigger word -> text encoder -> embedding (hidden,).
        allow_mismatch: leave out embeddings of other sizes, too.

    Returns:
        The tokens that fit, and what is left out, for a message.

    Raises:
        UserError: an embedding has another size than a text encoder takes.
    """
    sizes = {encoder: table.embedding_dim for encoder, _, table in _text_encoders(pipe)}
    fitting: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for word, vectors in tokens.items():
        fitting[word] = {e: v for e, v in vectors.items() if e in sizes and not (allow_mismatch and len(v) != sizes[e])}
        check_vectors(pipe, word, fitting[word])
        for encoder in vectors.keys() - fitting[word].keys():
            why = "takes another size" if encoder in sizes else "this pipeline does not have"
            left_out.append(f"the embedding of {word!r} for {encoder}, which {why}")
    return {word: vectors for word, vectors in fitting.items() if vectors}, sorted(left_out)


def _check_free(pipe: Any, word: str) -> None:
    """Refuse a word with blanks, one that is taken, and one that has a meaning for a tokenizer."""
    if not word or word.split() != [word]:
        raise UserError(f"{word!r} cannot be a trigger word: it must be one word without blanks")
    for encoder, tokenizer, _ in _text_encoders(pipe):
        if word in tokenizer.all_special_tokens or _known_id(tokenizer, word) in tokenizer.all_special_ids:
            raise UserError(
                f"{word!r} cannot be a trigger word: it is a special token of {encoder}, in every prompt; "
                "load with trigger_word='another word'"
            )
    for other, entry in trigger_words(pipe).items():
        if word.lower() == other.lower():
            by = f" by {entry.owner!r}" if entry.owner else ""
            spelt = "" if word == other else f" as {other!r}, and CLIP sees no case"
            raise UserError(
                f"the trigger word {word!r} is taken{by}{spelt}: "
                "load with trigger_word='another word', or unload the other concept first"
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


def _convert_prompt(vocabulary: _Vocabulary, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
    """Write out the trigger words of a prompt or of several: in place of a pipeline's own `maybe_convert_prompt`."""
    if isinstance(prompt, list):
        return [_write_out(vocabulary.words, each, tokenizer) for each in prompt]
    return _write_out(vocabulary.words, prompt, tokenizer)


def _write_out(words: Mapping[str, TriggerWord], prompt: str, tokenizer: Any) -> str:
    """Write the trigger words of a prompt as its tokenizer knows them: "SKS mug" as "sks sks_1 mug".

    What diffusers itself has loaded is left to it. It would replace our words within others too: "mu" in "mug".
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    parts = split_at_words(prompt, words, tokenizer.added_tokens_encoder)
    parts[1::2] = [" ".join(words[word].group) for word in parts[1::2]]
    parts[::2] = TextualInversionLoaderMixin().maybe_convert_prompt(parts[::2], tokenizer)
    return " ".join(part.strip() for part in parts).strip()


def _make_tokens(pipe: Any, words: Iterable[str]) -> None:
    """Make each word one token of every tokenizer."""
    from transformers import AddedToken

    vocabulary, words = _vocabulary(pipe), list(words)
    for encoder, tokenizer, table in list(_text_encoders(pipe)):
        several = {word for word in words if len(vocabulary.words[word].group) > 1}
        several -= tokenizer.added_tokens_encoder.keys()
        unknown = [word for word in words if _known_id(tokenizer, word) is None or word in several]
        if not unknown:
            continue
        if encoder not in vocabulary.tokenizers:
            # Tokenizers cannot forget a word, so the original is set aside.
            vocabulary.tokenizers[encoder] = tokenizer
            tokenizer = copy.deepcopy(tokenizer)
            setattr(pipe, encoder.replace("text_encoder", "tokenizer"), tokenizer)
        # Normalized, "mug" stays out of "<mug-style>"; but of "Mug" diffusers would not find further vectors then.
        added = [AddedToken(word, single_word=True, normalized=word == word.lower()) for word in unknown]
        tokenizer.add_tokens(added)
        if len(tokenizer) > len(table.weight):
            vocabulary.table_sizes.setdefault(encoder, len(table.weight))
            _resize_table(getattr(pipe, encoder), len(tokenizer))
            _find_end(vocabulary, encoder, getattr(pipe, encoder), tokenizer.eos_token_id)


def _resize_table(model: Any, size: int) -> None:
    """Cut or lengthen a text encoder's embedding table, in the same parameter; new rows are the mean of the others."""
    table = model.get_input_embeddings()
    if model.config.vocab_size == table.num_embeddings:
        model.config.vocab_size = size
    rows = table.weight.data
    new = rows.mean(dim=0, keepdim=True).expand(max(size - len(rows), 0), -1)
    table.weight.data = torch.cat([rows[:size], new])
    table.num_embeddings = size


def _find_end(vocabulary: _Vocabulary, encoder: str, model: Any, end: int) -> None:
    """Let a text encoder look for the true id of a prompt's end, whose state it pools.

    In old configs, such as SDXL's, that id is 2; transformers then takes the highest id of a prompt for its end, which
    an added word would be.
    """
    if model.config.eos_token_id == _OLD_END != end:
        vocabulary.ends.add(encoder)
        _set_end(model, end)


def _set_end(model: Any, end: int) -> None:
    for module in (model.config, *model.modules()):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


def _reset(pipe: Any, vocabulary: _Vocabulary) -> None:
    """Tokenizers and tables as they were before the first trigger word, and with what others have added since."""
    since = []
    for encoder, tokenizer in vocabulary.tokenizers.items():
        model, name = getattr(pipe, encoder), encoder.replace("text_encoder", "tokenizer")
        added, known = getattr(pipe, name).added_tokens_decoder, {*tokenizer.added_tokens_encoder, *vocabulary.words}
        rows = model.get_input_embeddings().weight.data
        ids = [number for number in sorted(added) if added[number].content not in known and number < len(rows)]
        since.append((model, tokenizer, [added[number] for number in ids], rows[ids]))
        setattr(pipe, name, tokenizer)
    for encoder, rows in vocabulary.rows.items():
        table = getattr(pipe, encoder).get_input_embeddings()
        for row, values in rows.items():
            table.weight.data[row] = values.to(table.weight)
    for encoder, size in vocabulary.table_sizes.items():
        _resize_table(getattr(pipe, encoder), size)
    for encoder in vocabulary.ends:
        _set_end(getattr(pipe, encoder), _OLD_END)
    for model, tokenizer, tokens, vectors in since:
        table = model.get_input_embeddings()
        tokenizer.add_tokens(tokens)
        if tokens and len(tokenizer) > len(table.weight):
            _resize_table(model, len(tokenizer))
        table.weight.data[tokenizer.convert_tokens_to_ids([token.content for token in tokens])] = vectors
    vocabulary.tokenizers, vocabulary.rows, vocabulary.table_sizes, vocabulary.ends = {}, {}, {}, set()
