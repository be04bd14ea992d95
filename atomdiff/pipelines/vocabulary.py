"""Records of placeholder tokens: what text encoders and tokenizers of pipelines know, and what they were before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn


@dataclass
class PlaceholderToken:
    """A token in use, with its embedding per text encoder (none until one is set)."""

    owner: str | None = None
    """The adapter that brought it; None where it was added by hand."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Text encoder -> embedding (hidden,)."""
    group: list[str] = field(default_factory=list)
    """What a tokenizer takes it for: itself, and the tokens of further vectors, see `placeholder_tokens`."""
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
class ExtendedTokenizer:
    """A tokenizer that knows placeholder tokens."""

    name: str
    """The text encoder that it is for."""
    tokenizer: Any
    original: dict[str, Any] | None = None
    """Its attributes before the first added token; tokenizers cannot forget one."""
    added: set[str] = field(default_factory=set)
    """Tokens that were added to it."""


class Vocabulary:
    """The placeholder tokens of text encoders and tokenizers that pipelines bring together.

    They lie where they act: text encoders hold their vocabulary (in their `EmbeddingTable`), so that all pipelines that
    share one know the same tokens, and a copy of a text encoder has a vocabulary of its own.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, PlaceholderToken] = {}
        self.tokenizers: list[ExtendedTokenizer] = []
        self.tables: WeakSet[EmbeddingTable] = WeakSet()

    def tokenizer_of(self, table: EmbeddingTable) -> Any:
        """A tokenizer for a text encoder; all that there are give its tokens the same ids."""
        return next(entry.tokenizer for entry in self.tokenizers if entry.name == table.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "tokenizers": self.tokenizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)
        for entry in self.tokenizers:
            VOCABULARY_OF[entry.tokenizer] = self


class EmbeddingTable:
    """The embedding table of a text encoder, and what it was before placeholder tokens came."""

    def __init__(self, vocabulary: Vocabulary, name: str, encoder: Any) -> None:
        self.vocabulary, self.name, self.encoder = vocabulary, name, encoder
        self.size: int | None = None  # rows before the first added token
        self.vocab_size = 0  # of the config, then
        self.rows: dict[int, Tensor] = {}  # as they were before they were overwritten
        self.old_end = False  # whether the encoder looks for the end of a prompt by another id meanwhile
        vocabulary.tables.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.vocabulary.tables.add(self)

    @property
    def embedding(self) -> nn.Embedding:
        """The module."""
        embedding: nn.Embedding = self.encoder.get_input_embeddings()
        return embedding


TABLE = "_atomdiff_table"  # attribute of a text encoder


VOCABULARY_OF: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabularies(pipe: Any) -> list[Vocabulary]:
    """What the text encoders and tokenizers of a pipeline know; one vocabulary, unless they came from several."""
    encoders = list(text_encoders(pipe))
    known = [vars(encoder)[TABLE].vocabulary for _, encoder, _ in encoders if TABLE in vars(encoder)]
    known += [VOCABULARY_OF[tokenizer] for _, _, tokenizer in encoders if tokenizer in VOCABULARY_OF]
    return [vocabulary for vocabulary in dict.fromkeys(known) if vocabulary.tokens]


def text_encoders(pipe: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, text encoder and tokenizer, of every text encoder that has a tokenizer."""
    components = pipe.components  # diffusers looks at a signature each time
    for name, encoder in components.items():
        tokenizer = components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and encoder is not None and tokenizer is not None:
            yield name, getattr(encoder, "_orig_mod", encoder), tokenizer


def has_placeholder_tokens(part: Any) -> bool:
    """Whether a text encoder or a tokenizer knows placeholder tokens."""
    return part is not None and (TABLE in vars(part) or part in VOCABULARY_OF)
