"""The few concepts of a large job that are in the pipeline, each row of a batch wearing its own."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.concept_parts import warn_of_left_out
from atomdiff.pipelines.load import load_concept, unload_atoms
from atomdiff.pipelines.mixed_batch import mixed_batch
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, fitting_tokens, set_token_embedding
from atomdiff.pipelines.switch import set_active
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.sampling.batching import Concept, Line
from atomdiff.utils.errors import UserError

MOST_LOADED = 32  # concepts kept in a pipeline, unless one batch has more
_NAME_LENGTH = 60


class Wardrobe:
    """The concepts in a pipeline: loaded when a batch needs them, those that were used last stay.

    Each trigger word has another name inside, so that thousands of concepts can all be called "sks" and a row without
    concepts sees what the base knows by that word.

    Args:
        pipe: a pipeline without concepts.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._loaded: OrderedDict[Concept, str | None] = OrderedDict()  # -> adapter; None: it is only words
        self._words: dict[Concept, dict[str, str]] = {}  # in prompts -> inside, a word for each vector
        self._inside: dict[Concept, tuple[str, ...]] = {}  # names inside
        self._encoders: dict[str, frozenset[str]] = {}  # name inside -> text encoders in which it has an embedding
        self._free: list[str] = []  # names inside that nobody uses
        self._count = 0  # of loads
        self._written: Mapping[str, AdapterWeight] | None = None  # what is in the weights

    @contextmanager
    def worn(self, lines: Sequence[Line]) -> Iterator[None]:
        """Within, the pipeline draws these lines, one prompt a row, each with its concepts.

        Raises:
            UserError: a concept cannot be loaded, or worn as it is asked.
        """
        self._load_all(dict.fromkeys(concept for line in lines for concept, _ in line.concepts))
        rows: list[dict[str, AdapterWeight]] = [
            {name: strength for concept, strength in line.concepts if (name := self._loaded[concept]) is not None}
            for line in lines
        ]
        if any(row != rows[0] for row in rows):
            with mixed_batch(self.pipe, rows):
                yield
            return
        if rows[0] != self._written:
            set_active(self.pipe, rows[0])
            self._written = rows[0]
        yield

    def spell(self, line: Line, text: str) -> str:
        """A text with the trigger words of a line's concepts, which are worn, as the pipeline knows them."""
        return line.spell(text, self._words)

    def _load_all(self, wanted: Iterable[Concept]) -> None:
        wanted = list(wanted)
        for concept in wanted:
            if concept in self._loaded:
                self._loaded.move_to_end(concept)
        for concept in wanted:
            if concept not in self._loaded:
                while len(self._loaded) >= max(MOST_LOADED, len(wanted)):
                    self._unload()
                try:
                    self._load(concept)
                except UserError as error:
                    raise UserError(f"the concept {concept.name!r} ({concept.path}): {error}") from error

    def _load(self, concept: Concept) -> None:
        self._written = None  # loading and unloading restore the weights
        self._count += 1
        name = f"{re.sub(r'[^A-Za-z0-9_]', '_', concept.name)[:_NAME_LENGTH]}-{self._count}"
        if concept.read is None:
            load_concept(self.pipe, concept.path, name, trigger_word=concept.trigger_word)
            self._loaded[concept], self._words[concept] = name, {word: word for word in concept.words}
            return
        delta = concept.read()
        tokens, left_out = fitting_tokens(self.pipe, delta.tokens)
        if delta.layers:
            load_concept(self.pipe, replace(delta, tokens={}), name)
        warn_of_left_out(concept.name, left_out)
        inside = {word: self._teach(vectors) for word, vectors in tokens.items()}
        groups = group_placeholder_tokens(inside)
        spelled = {word: " ".join(inside[each] for each in groups.get(word, [word])) for word in inside}
        self._words[concept] = {word: spelled.get(word, word) for word in concept.words}
        self._inside[concept] = tuple(inside.values())
        self._loaded[concept] = name if delta.layers else None

    def _teach(self, vectors: Mapping[str, Any]) -> str:
        """Give embeddings a name inside; one that another concept had spares a new row of the tables."""
        name = next((name for name in self._free if self._encoders[name] == set(vectors)), None)
        if name is None:
            name = f"atomdiffword{len(self._encoders)}"
            add_placeholder_token(self.pipe, name)
            self._encoders[name] = frozenset(vectors)
        else:
            self._free.remove(name)
        set_token_embedding(self.pipe, name, vectors)
        return name

    def _unload(self) -> None:
        """Take out the concept that has not been used for longest."""
        concept, name = self._loaded.popitem(last=False)
        del self._words[concept]
        if name is not None:
            unload_atoms(self.pipe, name)
        self._free += self._inside.pop(concept, ())
