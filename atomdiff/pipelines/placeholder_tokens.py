"""Trigger words: a word of one token whose embedding is part of a concept, put into a pipeline and taken out again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from atomdiff.pipelines.caller import find_caller
from atomdiff.pipelines.prompt_syntax import split_at_words
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.tuner import weight_access
from atomdiff.utils.errors import UserError

_OLD_END = 2
_LOCK = threading.RLock()  # of tokenizers, which hold how they pad, and of what their calls teach others


@dataclass
class PlaceholderToken:
    """A word in use, with its embedding per text encoder (none until one is set)."""

    owner: str | None = None
    """The adapter that brought it; None where it was added by hand."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    group: list[str] = field(default_factory=list)
    """What it is written as for a tokenizer: itself, and the words of its further vectors, see `placeholder_tokens`."""
    came_with: WeakSet[nn.Module] | None = None
    """The models that got layers with it; None: it came alone."""
    loaded_by: ref[Any] | None = None
    """The pipeline that it was loaded into."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies know that there were layers, and look for their own."""
        return vars(self) | {"came_with": self.came_with is not None, "loaded_by": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, came_with=WeakSet() if state["came_with"] else None)


@dataclass(eq=False)
class _Tokens:
    """A tokenizer that was taught trigger words."""

    name: str
    """The text encoder that it is for."""
    tokenizer: Any
    original: dict[str, Any] | None = None
    """Its attributes before the first added word; tokenizers cannot forget one."""
    added: set[str] = field(default_factory=set)
    """Words that it learned."""


class _Vocabulary:
    """The trigger words of text encoders and tokenizers that pipelines bring together.

    The words lie where they act: text encoders hold their vocabulary (in their `_Table`), so that all pipelines which
    share one know the same words, and a copy of a text encoder has a vocabulary of its own.
    """

    def __init__(self) -> None:
        self.words: dict[str, PlaceholderToken] = {}
        self.tokens: list[_Tokens] = []
        self.tables: WeakSet[_Table] = WeakSet()

    def tokenizer_of(self, table: _Table) -> Any:
        """A tokenizer for a text encoder; all that there are give its words the same ids."""
        return next(entry.tokenizer for entry in self.tokens if entry.name == table.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"words": self.words, "tokens": self.tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)
        for entry in self.tokens:
            _OF_TOKENIZER[entry.tokenizer] = self


class _Table:
    """The embedding table of a text encoder, and what it takes to forget trigger words."""

    def __init__(self, vocabulary: _Vocabulary, name: str, encoder: Any) -> None:
        self.vocabulary, self.name, self.encoder = vocabulary, name, encoder
        self.size: int | None = None  # rows before the first added word
        self.vocab_size = 0  # as the config said then
        self.rows: dict[int, Tensor] = {}  # as they were before they were overwritten
        self.old_end = False  # whether the encoder looks for the end of a prompt by another id meanwhile
        vocabulary.tables.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.vocabulary.tables.add(self)

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.encoder.get_input_embeddings()
        return found


_TABLE = "_atomdiff_table"  # attribute of a text encoder
_OF_TOKENIZER: WeakKeyDictionary[Any, _Vocabulary] = WeakKeyDictionary()


def tokens_in(pipe: Any) -> dict[str, PlaceholderToken]:
    """The trigger words that a pipeline's text encoders and tokenizers know, whichever pipeline brought them."""
    return {word: entry for vocabulary in _vocabularies(pipe) for word, entry in vocabulary.words.items()}


def add_placeholder_token(pipe: Any, word: str, owner: str | None = None) -> int:
    """Make a word one token for every text encoder of a pipeline.

    A word that is one known token already keeps its id and embedding. Any other is added to the tokenizer itself,
    and to the embedding table as a row, the mean of the table until an embedding is set: all pipelines that share them
    know it.

    Args:
        pipe: the pipeline.
        word: without blanks.
        owner: the adapter that it belongs to.

    Returns:
        The token's id in `pipe.tokenizer`; `token_id(pipe, word, text_encoder)` gives it for any text encoder.

    Raises:
        UserError: the word cannot be one, or the pipeline has no text encoder.
    """
    add_placeholder_tokens(pipe, [word], owner)
    return token_id(pipe, word, next(encoder for encoder, *_ in _text_encoders(pipe)))


def add_placeholder_tokens(pipe: Any, words: Iterable[str], owner: str | None = None) -> None:
    """Add several words; the embedding tables are copied once for all of them.

    Where "sks_1" is added with "sks", the tokenizers take "sks" in a prompt for "sks sks_1", and so on with "sks_2",
    ...: one trigger word of several vectors. Then "sks" is added even if it is a known token. A word counts in any
    case, as words that CLIP knows do, and only where it is a word of its own: not "mu" in "mug".

    Args:
        pipe: the pipeline.
        words: each once; `add_placeholder_token` says what becomes of them.
        owner: the adapter that they belong to.

    Raises:
        UserError: as for `check_addable`; nothing is changed.
    """
    words = list(words)
    check_addable(pipe, words)
    if not words:
        return
    vocabulary, groups = _link(pipe), group_placeholder_tokens(words)
    vocabulary.words.update({word: PlaceholderToken(owner, group=groups.get(word, [word])) for word in words})
    _make_tokens(vocabulary, words)


def token_id(pipe: Any, word: str, text_encoder: str = "text_encoder") -> int:
    """The id of a trigger word for one text encoder.

    Raises:
        UserError: the word is not one token there.
    """
    for encoder, tokenizer, _ in _text_encoders(pipe):
        if encoder == text_encoder and (known := _known_id(tokenizer, word)) is not None:
            return known
    raise UserError(f"{word!r} is not one token of {text_encoder}: call add_placeholder_token(pipe, {word!r}) first")


def set_token_embedding(pipe: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Write a trigger word's embedding into the tables of the text encoders; the old rows are kept for removal.

    Args:
        pipe: the pipeline.
        word: added before.
        vectors: text encoder -> embedding (hidden,).

    Raises:
        UserError: the word was not added, or a vector does not fit a text encoder; nothing is changed.
    """
    if word not in tokens_in(pipe):
        raise UserError(f"{word!r} is not a trigger word yet: call add_placeholder_token(pipe, {word!r}) first")
    check_vectors(pipe, word, vectors)
    vocabulary = _link(pipe)
    vocabulary.words[word].vectors.update({name: vector.detach().clone() for name, vector in vectors.items()})
    _write_rows(vocabulary, [word])


def remove_placeholder_token(pipe: Any, word: str) -> None:
    """Take a trigger word out: tokenizers and embedding tables are as if it had never been added, to every bit.

    Ids of words that were added after it change.

    Raises:
        UserError: the word is not a trigger word.
    """
    remove_placeholder_tokens(pipe, [word])


def remove_placeholder_tokens(pipe: Any, words: Iterable[str]) -> None:
    """Take several words out; the embedding tables are copied once for all of them.

    Args:
        pipe: the pipeline.
        words: `remove_placeholder_token` says what becomes of them.

    Raises:
        UserError: a word is not a trigger word; nothing is changed.
    """
    there, gone = tokens_in(pipe), set(words)
    for word in gone - there.keys():
        raise UserError(f"{word!r} is not a trigger word; there are: {', '.join(there) or 'none'}")
    if not gone:
        return
    for vocabulary in _vocabularies(pipe):
        if not gone.isdisjoint(vocabulary.words):
            _reset(vocabulary)
            _forget(vocabulary, gone)
            _lay_out(vocabulary)


def look_again(pipe: Any) -> None:
    """Look at what there is before it is believed: others exchange text encoders and tokenizers, and take out words.

    Words that are gone from a tokenizer are forgotten; parts that came since learn the words that others know.

    Raises:
        UserError: as for `check_addable`.
    """
    for vocabulary in _vocabularies(pipe):
        gone = {
            word for entry in vocabulary.tokens for word in entry.added - entry.tokenizer.added_tokens_encoder.keys()
        }
        if gone:
            _reset(vocabulary)
            _forget(vocabulary, gone)
            _lay_out(vocabulary)
    if tokens_in(pipe):
        _link(pipe)


def check_addable(pipe: Any, words: Sequence[str], instead_of: Collection[str] = ()) -> None:
    """Check that words can be added together.

    Args:
        pipe: the pipeline.
        words: the words.
        instead_of: trigger words that will be taken out before.

    Raises:
        UserError: one cannot be a trigger word, two differ in case only, or the pipeline has no text encoder, or one
            that was brought together with a tokenizer that does not fit.
    """
    for word in words:
        _check_free(pipe, word, instead_of)
    if words:
        _check_linkable(pipe)
    if words and not any(_text_encoders(pipe)):
        raise UserError(f"{type(pipe).__name__} has no text encoder with a tokenizer to teach {words[0]!r}")
    spellings = {word.lower(): word for word in words}
    for word in words:
        if (other := spellings[word.lower()]) != word:
            found = f"the trigger words {word!r} and {other!r} differ in case only, which CLIP does not see"
            raise UserError(f"{found}: give each a word of its own")
    several = {first for first, group in group_placeholder_tokens(words).items() if len(group) > 1}
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


def _check_free(pipe: Any, word: str, instead_of: Collection[str]) -> None:
    """Refuse a word with blanks, one that is taken, and one that has a meaning for a tokenizer."""
    if not word or word.split() != [word]:
        raise UserError(f"{word!r} cannot be a trigger word: it must be one word without blanks")
    for encoder, tokenizer, _ in _text_encoders(pipe):
        if word in tokenizer.all_special_tokens or _known_id(tokenizer, word) in tokenizer.all_special_ids:
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


def _vocabularies(pipe: Any) -> list[_Vocabulary]:
    """What the text encoders and tokenizers of a pipeline know; one vocabulary, unless they came from several."""
    found = [vars(encoder)[_TABLE].vocabulary for _, encoder, _ in _parts(pipe) if _TABLE in vars(encoder)]
    found += [_OF_TOKENIZER[tokenizer] for _, _, tokenizer in _parts(pipe) if tokenizer in _OF_TOKENIZER]
    return [vocabulary for vocabulary in dict.fromkeys(found) if vocabulary.words]


def _parts(pipe: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, text encoder and tokenizer, of every text encoder that has a tokenizer."""
    for name, encoder in pipe.components.items():
        tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and encoder is not None and tokenizer is not None:
            yield name, getattr(encoder, "_orig_mod", encoder), tokenizer


def _text_encoders(pipe: Any) -> Iterator[tuple[str, Any, nn.Embedding]]:
    """Name, tokenizer and embedding table of every text encoder that has a tokenizer."""
    for name, encoder, tokenizer in _parts(pipe):
        yield name, tokenizer, encoder.get_input_embeddings()


def _check_linkable(pipe: Any) -> None:
    """Refuse parts that know different trigger words, and tokenizers that would give a word another id."""
    found = _vocabularies(pipe)
    if len(found) > 1:
        words = " and ".join(", ".join(map(repr, vocabulary.words)) for vocabulary in found)
        raise UserError(
            f"the text encoders and tokenizers of this {type(pipe).__name__} know different trigger words, {words}, "
            "from pipelines that they were in before: unload the concepts there, or take tokenizer and text encoder "
            "from one pipeline"
        )
    for vocabulary in found:
        for name, _, tokenizer in _parts(pipe):
            others = [entry.tokenizer for entry in vocabulary.tokens if entry.name == name]
            if tokenizer not in others:
                tokenizer = copy.deepcopy(tokenizer)
                _teach(tokenizer, vocabulary, vocabulary.words)
            if any(_ids(other, vocabulary.words) != _ids(tokenizer, vocabulary.words) for other in others):
                raise UserError(
                    f"{name} knows trigger words by another tokenizer, which gives them other ids than that of this "
                    f"{type(pipe).__name__}: let pipelines that share a text encoder share the tokenizer, too"
                )


def _ids(tokenizer: Any, words: Iterable[str]) -> list[int | None]:
    """The ids of words, and of the next one."""
    return [*(_known_id(tokenizer, word) for word in words), len(tokenizer)]


def _link(pipe: Any) -> _Vocabulary:
    """Let all text encoders and tokenizers of a pipeline know the words that one of them knows."""
    _check_linkable(pipe)
    vocabulary = next(iter(_vocabularies(pipe)), None) or _Vocabulary()
    for name, encoder, tokenizer in _parts(pipe):
        known = any(entry.tokenizer is tokenizer and entry.name == name for entry in vocabulary.tokens)
        if not known:
            vocabulary.tokens.append(_Tokens(name, tokenizer))
            _OF_TOKENIZER[tokenizer] = vocabulary
            _listen(tokenizer)
        if _TABLE not in vars(encoder):
            vars(encoder)[_TABLE] = _Table(vocabulary, name, encoder)
            encoder.register_forward_pre_hook(_check_tokenizer, with_kwargs=True)
        elif known:
            continue
        _lay_out(vocabulary)
    return vocabulary


def _pieces(tokenizer: Any, word: str) -> list[int]:
    """The ids of a word as a tokenizer has it, not written out."""
    found: list[int] = type(tokenizer)._encode_plus(tokenizer, word, add_special_tokens=False)["input_ids"]
    return found


def _known_id(tokenizer: Any, word: str) -> int | None:
    ids = _pieces(tokenizer, word)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _listen(tokenizer: Any) -> None:
    """Let a tokenizer write trigger words out, whichever pipeline calls it."""
    vars(tokenizer).update({name: partial(call, tokenizer) for name, call in _TOKENIZER_CALLS.items()})


def _stop_listening(tokenizer: Any) -> None:
    for name in _TOKENIZER_CALLS:
        vars(tokenizer).pop(name, None)


def _encode(tokenizer: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
    """As the tokenizer's own, in which all calls end; the pipeline that calls learns words that it does not know."""
    with _LOCK:
        if not kwargs.get("is_split_into_words"):
            text = [_written(tokenizer, each) for each in text] if isinstance(text, list) else _written(tokenizer, text)
        return type(tokenizer)._encode_plus(tokenizer, text, *args, **kwargs)


def _tokenize(tokenizer: Any, *args: Any, **kwargs: Any) -> list[str]:
    """As the tokenizer's own; a word of several vectors is one token, "sks sks_1", which diffusers leaves alone.

    Diffusers would write "sks" out itself otherwise, also within other words.
    """
    tokens = type(tokenizer).tokenize(tokenizer, *args, **kwargs)
    vocabulary = _OF_TOKENIZER.get(tokenizer)
    for entry in vocabulary.words.values() if vocabulary else ():
        count = len(entry.group)
        for place in range(len(tokens) - count, -1, -1) if count > 1 else ():
            if tokens[place : place + count] == entry.group:
                tokens[place : place + count] = [" ".join(entry.group)]
    return tokens  # type: ignore[no-any-return]


_TOKENIZER_CALLS: dict[str, Any] = {"_encode_plus": _encode, "tokenize": _tokenize}


def _written(tokenizer: Any, text: Any) -> Any:
    """A prompt with its trigger words as the tokenizer knows them: "SKS mug" as "sks sks_1 mug"."""
    caller = find_caller(tokenizer)
    found = _vocabularies(caller.pipe) if caller else [_OF_TOKENIZER[tokenizer]] if tokenizer in _OF_TOKENIZER else []
    words = {" ".join(entry.group): entry for vocabulary in found for entry in vocabulary.words.values()}
    words |= {word: entry for vocabulary in found for word, entry in vocabulary.words.items()}
    if not words or not isinstance(text, str):
        return text
    parts = split_at_words(text, words, tokenizer.added_tokens_encoder)
    if len(parts) == 1:
        return text
    if caller:
        _link(caller.pipe)
    parts[1::2] = [" ".join(words[word].group) for word in parts[1::2]]
    return " ".join(part.strip() for part in parts).strip()


def _check_tokenizer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse prompts whose trigger words a tokenizer that does not know them has taken apart; it learns them then."""
    if torch.compiler.is_compiling() or (caller := find_caller(model)) is None:
        return
    vocabulary = vars(model)[_TABLE].vocabulary
    known = [entry.tokenizer for entry in vocabulary.tokens]
    for tokenizer in [tokenizer for _, encoder, tokenizer in _parts(caller.pipe) if encoder is model]:
        if any(tokenizer is each for each in known):
            continue
        pieces = {word: _pieces(tokenizer, word) for word in vocabulary.words}
        with _LOCK:
            _link(caller.pipe)
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows = ids.tolist() if isinstance(ids, Tensor) and ids.ndim > 1 else []
        apart = [word for word in pieces if pieces[word] != _pieces(tokenizer, word)]
        for word in apart:
            if any(_holds(row, pieces[word]) for row in rows):
                raise UserError(
                    f"the tokenizer of this {type(caller.pipe).__name__} did not know the trigger word {word!r} of its "
                    "text encoder, which came by another pipeline, and took it apart: it knows it now, call again"
                )


def _holds(ids: list[int], pieces: list[int]) -> bool:
    return any(ids[place : place + len(pieces)] == pieces for place in range(len(ids)))


def _make_tokens(vocabulary: _Vocabulary, words: Iterable[str]) -> None:
    """Make each word one token of every tokenizer, with a row in every table."""
    words = list(words)
    for entry in vocabulary.tokens:
        if not (unknown := _unknown(entry.tokenizer, vocabulary, words)):
            continue
        if entry.original is None:
            # Tokenizers cannot forget a word, so what one was is set aside; others share the object itself.
            attributes = vars(entry.tokenizer)
            entry.original, taught = dict(attributes), vars(copy.deepcopy(entry.tokenizer))
            attributes.clear()
            attributes.update(taught)
            _listen(entry.tokenizer)
        _teach(entry.tokenizer, vocabulary, words)
        entry.added.update(unknown)
    for table in vocabulary.tables:
        tokenizer = vocabulary.tokenizer_of(table)
        last = max((_known_id(tokenizer, word) or 0 for word in words), default=0)
        if last >= len(table.embedding.weight):
            if table.size is None:
                table.size, table.vocab_size = len(table.embedding.weight), table.encoder.config.vocab_size
            _resize_table(table.encoder, len(tokenizer))
            _find_end(table, tokenizer.eos_token_id)


def _resize_table(model: Any, size: int) -> None:
    """Cut or lengthen a text encoder's embedding table, in the same parameter; new rows are the mean of the others."""
    table = model.get_input_embeddings()
    if model.config.vocab_size == table.num_embeddings:
        model.config.vocab_size = size
    with weight_access.loaded_in_module(table):
        rows = table.weight.data
        new = rows.mean(dim=0, keepdim=True).expand(max(size - len(rows), 0), -1)
        table.weight.data = torch.cat([rows[:size], new])
    table.num_embeddings = size


def _unknown(tokenizer: Any, vocabulary: _Vocabulary, words: Iterable[str]) -> list[str]:
    """The words that a tokenizer has to learn: those that are not one token, and those of several vectors."""
    words, known = list(words), tokenizer.added_tokens_encoder.keys()
    several = {word for word in words if len(vocabulary.words[word].group) > 1} - known
    return [word for word in words if _known_id(tokenizer, word) is None or word in several]


def _teach(tokenizer: Any, vocabulary: _Vocabulary, words: Iterable[str]) -> None:
    from transformers import AddedToken

    # Normalized, "mug" stays out of "<mug-style>"; but of "Mug" diffusers would not find further vectors then.
    unknown = _unknown(tokenizer, vocabulary, words)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=word == word.lower()) for word in unknown])


def _lay_out(vocabulary: _Vocabulary) -> None:
    """Let all tokenizers and tables have all words."""
    _make_tokens(vocabulary, vocabulary.words)
    _write_rows(vocabulary, vocabulary.words)


def _write_rows(vocabulary: _Vocabulary, words: Iterable[str]) -> None:
    """Write the embeddings of words into the tables, and keep the rows of words that were known before."""
    words = list(words)
    for table in vocabulary.tables:
        with weight_access.loaded_in_module(table.embedding):
            tokenizer, rows = vocabulary.tokenizer_of(table), table.embedding.weight.data
            for word in words:
                vector, row = vocabulary.words[word].vectors.get(table.name), _known_id(tokenizer, word)
                if vector is None or row is None or vector.shape != rows[row].shape:
                    continue
                if row < (len(rows) if table.size is None else table.size):
                    table.rows.setdefault(row, rows[row].clone())
                rows[row] = vector.to(rows)


def _forget(vocabulary: _Vocabulary, words: Collection[str]) -> None:
    """Forget words, after `_reset`; a vocabulary without any leaves its text encoders and tokenizers."""
    vocabulary.words = {word: entry for word, entry in vocabulary.words.items() if word not in words}
    for entry in vocabulary.words.values():
        entry.group = [each for each in entry.group if each not in words]
    if not vocabulary.words:
        for table in vocabulary.tables:
            del vars(table.encoder)[_TABLE]
            _stop_checking(table.encoder)
        for tokens in vocabulary.tokens:
            _OF_TOKENIZER.pop(tokens.tokenizer, None)
            _stop_listening(tokens.tokenizer)
        vocabulary.tables.clear()
        vocabulary.tokens.clear()


def _stop_checking(encoder: Any) -> None:
    hooks = encoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _check_tokenizer]:
        del hooks[key]
        encoder._forward_pre_hooks_with_kwargs.pop(key, None)


def _find_end(table: _Table, end: int) -> None:
    """Let a text encoder look for the true id of a prompt's end, whose state it pools.

    In old configs, such as SDXL's, that id is 2; transformers then takes the highest id of a prompt for its end, which
    an added word would be.
    """
    if table.encoder.config.eos_token_id == _OLD_END != end:
        table.old_end = True
        _set_end(table.encoder, end)


def _set_end(model: Any, end: int) -> None:
    for module in (model.config, *model.modules()):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


def _reset(vocabulary: _Vocabulary) -> None:
    """Tokenizers and tables as they were before the first trigger word, and with what others have added since."""
    since = [(table, *_added_by_others(vocabulary, table)) for table in vocabulary.tables]
    for entry in vocabulary.tokens:
        if entry.original is not None:
            attributes = vars(entry.tokenizer)
            others = _tokens_of_others(entry, vocabulary)
            attributes.clear()
            attributes.update(entry.original)
            entry.tokenizer.add_tokens([token for _, token in others])
            entry.original, entry.added = None, set()
    for table, tokens, vectors in since:
        with weight_access.loaded_in_module(table.embedding):
            rows, tokenizer = table.embedding.weight.data, vocabulary.tokenizer_of(table)
            for row, values in table.rows.items():
                rows[row] = values.to(rows)
            if table.size is not None:
                size = max(table.size, len(tokenizer)) if tokens else table.size
                _resize_table(table.encoder, size)
                table.encoder.config.vocab_size = table.vocab_size + size - table.size
            if tokens:
                ids = tokenizer.convert_tokens_to_ids([token.content for token in tokens])
                table.embedding.weight.data[ids] = vectors
        if table.old_end:
            _set_end(table.encoder, _OLD_END)
        table.size, table.rows, table.old_end = None, {}, False


def _added_by_others(vocabulary: _Vocabulary, table: _Table) -> tuple[list[Any], Tensor]:
    """The tokens that others gave a text encoder's tokenizer after ours, and their rows."""
    rows = table.embedding.weight.data
    entries = [entry for entry in vocabulary.tokens if entry.name == table.name and entry.original is not None]
    found = _tokens_of_others(entries[0], vocabulary) if entries else []
    found = [(number, token) for number, token in found if number < len(rows)]
    with weight_access.loaded_in_module(table.embedding):
        return [token for _, token in found], table.embedding.weight.data[[number for number, _ in found]]


def _tokens_of_others(entry: _Tokens, vocabulary: _Vocabulary) -> list[tuple[int, Any]]:
    """Id and token of what others added to a tokenizer after ours."""
    before = object.__new__(type(entry.tokenizer))
    vars(before).update(entry.original or {})
    known = {*before.added_tokens_encoder, *vocabulary.words}
    added = entry.tokenizer.added_tokens_decoder
    return [(number, added[number]) for number in sorted(added) if added[number].content not in known]


def has_words(part: Any) -> bool:
    """Whether a text encoder or a tokenizer knows trigger words."""
    return part is not None and (_TABLE in vars(part) or part in _OF_TOKENIZER)


def without_words(encoder: Any) -> None:
    """Take the trigger words out of a copy of a text encoder that shares its tensors; they are left alone."""
    table = vars(encoder).pop(_TABLE, None)
    if table is None:
        return
    _stop_checking(encoder)
    embedding = encoder.get_input_embeddings()
    rows = embedding.weight.detach()[: table.size].clone()
    for row, values in table.rows.items():
        rows[row] = values.to(rows)
    embedding.weight, embedding.num_embeddings = nn.Parameter(rows, embedding.weight.requires_grad), len(rows)
    if table.size is not None:
        encoder.config.vocab_size = table.vocab_size
    if table.old_end:
        _set_end(encoder, _OLD_END)


def bare_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it was before its first trigger word, in an object of its own."""
    vocabulary = _OF_TOKENIZER.get(tokenizer)
    entries = [entry for entry in vocabulary.tokens if entry.tokenizer is tokenizer] if vocabulary else []
    original = next((entry.original for entry in entries if entry.original is not None), vars(tokenizer))
    bare = object.__new__(type(tokenizer))
    vars(bare).update(original)
    _stop_listening(bare)
    return bare
