"""Placeholder tokens of trigger words, with token embeddings of a concept: put into a pipeline and taken out again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from atomdiff.pipelines.embedding_tables import write_embeddings
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.pipelines.tokenizers import known_id
from atomdiff.pipelines.vocabulary import PlaceholderToken, text_encoders, vocabularies
from atomdiff.pipelines.vocabulary_link import LOCK, check_linkable, link, make_tokens, take_tokens_out
from atomdiff.utils.errors import UserError


def tokens_in(pipe: Any) -> dict[str, PlaceholderToken]:
    """The placeholder tokens that a pipeline's text encoders and tokenizers know, whichever pipeline brought them."""
    return {word: entry for vocabulary in vocabularies(pipe) for word, entry in vocabulary.tokens.items()}


def add_placeholder_token(pipe: Any, word: str, owner: str | None = None) -> int:
    """Make a word one token for every text encoder of a pipeline.

    A word that is one known token already keeps its id and embedding. Any other is added to the tokenizer itself,
    and to the embedding table as a row, the mean of the table until an embedding is set: all pipelines that share them
    know it. `owner` is the adapter that it belongs to.

    Returns:
        The token's id in `pipe.tokenizer`; `token_id(pipe, word, text_encoder)` gives it for any text encoder.

    Raises:
        UserError: the word cannot be one, or the pipeline has no text encoder.
    """
    add_placeholder_tokens(pipe, [word], owner)
    return token_id(pipe, word, next(encoder for encoder, *_ in text_encoders(pipe)))


def add_placeholder_tokens(pipe: Any, words: Iterable[str], owner: str | None = None) -> None:
    """Add several words; the embedding tables are copied once for all of them.

    Where "sks_1" is added with "sks", the tokenizers take "sks" in a prompt for "sks sks_1", and so on with "sks_2",
    ...: one trigger word of several vectors. Then "sks" is added even if it is a known token. A word counts in any
    case, as words that CLIP knows do, and only where it is a word of its own: not "mu" in "mug".

    Raises:
        UserError: as for `check_addable`; nothing is changed.
    """
    words = list(words)
    check_addable(pipe, words)
    if not words:
        return
    groups = group_placeholder_tokens(words)
    with LOCK:
        vocabulary = link(pipe)
        vocabulary.tokens.update({word: PlaceholderToken(owner, group=groups.get(word, [word])) for word in words})
        make_tokens(vocabulary, words)


def token_id(pipe: Any, word: str, text_encoder: str = "text_encoder") -> int:
    """The id of a trigger word for one text encoder.

    Raises:
        UserError: the word is not one token there.
    """
    for encoder, _, tokenizer in text_encoders(pipe):
        if encoder == text_encoder and (known := known_id(tokenizer, word)) is not None:
            return known
    raise UserError(f"{word!r} is not one token of {text_encoder}: call add_placeholder_token(pipe, {word!r}) first")


def set_token_embedding(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Write a trigger word's embedding (hidden,) of each text encoder into its table; old rows are kept for removal.

    Raises:
        UserError: the word was not added, or a vector does not fit a text encoder; nothing is changed.
    """
    if word not in tokens_in(pipe):
        raise UserError(f"{word!r} is not a trigger word yet: call add_placeholder_token(pipe, {word!r}) first")
    check_vectors(pipe, word, vectors)
    with LOCK:
        vocabulary = link(pipe)
        vocabulary.tokens[word].vectors.update({name: vector.detach().clone() for name, vector in vectors.items()})
        write_embeddings(vocabulary, [word])


def remove_placeholder_tokens(pipe: Any, words: Iterable[str]) -> None:
    """Take trigger words out: tokenizers and embedding tables are as if they had never been added, to every bit.

    Ids of words that were added after them change.

    Raises:
        UserError: a word is not a trigger word; nothing is changed.
    """
    known, removed = tokens_in(pipe), set(words)
    for word in removed - known.keys():
        raise UserError(f"{word!r} is not a trigger word; there are: {', '.join(known) or 'none'}")
    with LOCK:
        for vocabulary in vocabularies(pipe):
            if not removed.isdisjoint(vocabulary.tokens):
                take_tokens_out(vocabulary, removed)


def refresh_tokens(pipe: Any) -> None:
    """Forget tokens that others have taken out of a tokenizer, and let parts that came since know those of the others.

    Raises:
        UserError: as for `check_addable`.
    """
    with LOCK:
        for vocabulary in vocabularies(pipe):
            deleted = {
                token
                for entry in vocabulary.tokenizers
                for token in entry.added - entry.tokenizer.added_tokens_encoder.keys()
            }
            if deleted:
                take_tokens_out(vocabulary, deleted)
        if tokens_in(pipe):
            link(pipe)


def check_addable(pipe: Any, words: Sequence[str], instead_of: Collection[str] = ()) -> None:
    """Check that words can be added together, once those in `instead_of` are taken out.

    Raises:
        UserError: one cannot be a trigger word, two differ in case only, or the pipeline has no text encoder, or one
            that was brought together with a tokenizer that does not fit.
    """
    for word in words:
        _check_free(pipe, word, instead_of)
    if words:
        check_linkable(pipe)
    if words and not any(text_encoders(pipe)):
        raise UserError(
            f"{type(pipe).__name__} has no text encoder with a tokenizer, which the trigger word {words[0]!r} needs"
        )
    spellings = {word.lower(): word for word in words}
    for word in words:
        if (other := spellings[word.lower()]) != word:
            problem = f"the trigger words {word!r} and {other!r} differ in case only, which CLIP does not see"
            raise UserError(f"{problem}: give each a word of its own")
    several = {first for first, group in group_placeholder_tokens(words).items() if len(group) > 1}
    for encoder, _, tokenizer in text_encoders(pipe):
        for word in words:
            new = word in several or known_id(tokenizer, word) is None
            piece = tokenizer.convert_tokens_to_ids(word) not in (None, tokenizer.unk_token_id)
            if new and piece and word not in tokenizer.added_tokens_encoder:
                raise UserError(
                    f"{word!r} cannot be a trigger word{' of several vectors' if word in several else ''}: {encoder} "
                    "builds other words from it, which would change as well; load with trigger_word='another word', or "
                    "train with another one"
                )


def check_vectors(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Check that embeddings fit the text encoders of a pipeline.

    Raises:
        UserError: a text encoder is missing, or its embeddings have another size.
    """
    sizes = _embedding_sizes(pipe)
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
    """The embeddings of trigger words that a pipeline has text encoders for, and what is left out, for a message.

    They are trigger word -> text encoder -> embedding (hidden,). With `allow_mismatch` other sizes are left out.

    Raises:
        UserError: an embedding has another size than a text encoder takes.
    """
    sizes = _embedding_sizes(pipe)
    fitting: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for word, vectors in tokens.items():
        fitting[word] = {e: v for e, v in vectors.items() if e in sizes and not (allow_mismatch and len(v) != sizes[e])}
        check_vectors(pipe, word, fitting[word])
        for encoder in vectors.keys() - fitting[word].keys():
            why = "takes another size" if encoder in sizes else "this pipeline does not have"
            left_out.append(f"the embedding of {word!r} for {encoder}, which {why}")
    return {word: vectors for word, vectors in fitting.items() if vectors}, sorted(left_out)


def _check_free(pipe: Any, word: str, instead_of: Collection[str]) -> None:
    """Refuse a word with blanks, one that is taken, and one that has a meaning for a tokenizer."""
    if not word or word.split() != [word]:
        raise UserError(f"{word!r} cannot be a trigger word: expected one word without spaces")
    for encoder, _, tokenizer in text_encoders(pipe):
        if word in tokenizer.all_special_tokens or known_id(tokenizer, word) in tokenizer.all_special_ids:
            raise UserError(
                f"{word!r} cannot be a trigger word: it is a special token of {encoder}, in every prompt; "
                "load with trigger_word='another word'"
            )
    for other, entry in tokens_in(pipe).items():
        if word.lower() == other.lower() and other not in instead_of:
            by = f" by {entry.owner!r}" if entry.owner else ""
            spelt = "" if word == other else f" as {other!r}, and CLIP sees no case"
            raise UserError(
                f"the trigger word {word!r} is taken{by}{spelt}: "
                "load with trigger_word='another word', or unload the other concept first"
            )


def _embedding_sizes(pipe: Any) -> dict[str, int]:
    """Text encoder -> size of its token embeddings."""
    return {name: encoder.get_input_embeddings().embedding_dim for name, encoder, _ in text_encoders(pipe)}
