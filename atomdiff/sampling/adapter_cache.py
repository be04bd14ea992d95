"""The concepts of a sampling job that are loaded in the pipeline: the most recently used ones."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
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
from atomdiff.sampling.concept_source import ConceptSource
from atomdiff.sampling.prompt_requests import PromptRequest
from atomdiff.utils.errors import UserError

MAX_LOADED = 32  # concepts in a pipeline, unless one batch needs more
_MAX_NAME_LENGTH = 60


class AdapterCache:
    """Loads the concepts that a batch uses and unloads those that were not used for longest.

    Each trigger word gets a placeholder token of its own, so that thousands of concepts can all be called "sks", and a
    prompt without concepts sees what the base knows by that word.

    Args:
        pipe: a pipeline without concepts.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._adapters: OrderedDict[ConceptSource, str | None] = OrderedDict()  # -> adapter name; None: only tokens
        self._replacements: dict[ConceptSource, dict[str, str]] = {}  # trigger word -> its placeholder tokens
        self._placeholders: dict[ConceptSource, tuple[str, ...]] = {}
        self._encoders: dict[str, frozenset[str]] = {}  # placeholder token -> text encoders in which it has a vector
        self._unused: list[str] = []  # placeholder tokens without a concept
        self._loads = 0
        self._active: Mapping[str, AdapterWeight] | None = None  # what is merged into the weights

    @contextmanager
    def use(self, requests: Sequence[PromptRequest]) -> Iterator[None]:
        """Make a `with` block in which the pipeline takes one prompt per request and applies its concepts.

        Raises:
            UserError: a concept cannot be loaded, or not with its weight.
        """
        self._load_all(list(dict.fromkeys(concept for request in requests for concept, _ in request.concepts)))
        samples: list[dict[str, AdapterWeight]] = [
            {name: weight for concept, weight in request.concepts if (name := self._adapters[concept]) is not None}
            for request in requests
        ]
        if any(sample != samples[0] for sample in samples):
            with mixed_batch(self.pipe, samples):
                yield
            return
        if samples[0] != self._active:
            set_active(self.pipe, samples[0])
            self._active = samples[0]
        yield

    def replace_trigger_words(self, request: PromptRequest, text: str) -> str:
        """Return a text of a request that is in use, with placeholder tokens for its trigger words."""
        return request.replace_trigger_words(text, self._replacements)

    def _load_all(self, wanted: Sequence[ConceptSource]) -> None:
        for concept in wanted:
            if concept in self._adapters:
                self._adapters.move_to_end(concept)
        for concept in wanted:
            if concept not in self._adapters:
                while len(self._adapters) >= max(MAX_LOADED, len(wanted)):
                    self._unload_oldest()
                try:
                    self._load(concept)
                except UserError as error:
                    raise UserError(f"the concept {concept.name!r} ({concept.path}): {error}") from error

    def _load(self, concept: ConceptSource) -> None:
        self._active = None  # loading and unloading restore the weights
        self._loads += 1
        name = f"{re.sub(r'[^A-Za-z0-9_]', '_', concept.name)[:_MAX_NAME_LENGTH]}-{self._loads}"
        words = concept.trigger_words
        if concept.read is None:
            load_concept(self.pipe, concept.path, name, trigger_word=concept.new_trigger_word)
            self._adapters[concept], self._replacements[concept] = name, {word: word for word in words}
            return
        delta = concept.read()
        tokens, left_out = fitting_tokens(self.pipe, delta.tokens)
        if delta.layers:
            load_concept(self.pipe, replace(delta, tokens={}), name)
        warn_of_left_out(concept.name, left_out)
        placeholders = {word: self._add_placeholder(vectors) for word, vectors in tokens.items()}
        groups = group_placeholder_tokens(placeholders)
        joined = {word: " ".join(placeholders[each] for each in groups.get(word, [word])) for word in placeholders}
        self._replacements[concept] = {word: joined.get(word, word) for word in words}
        self._placeholders[concept] = tuple(placeholders.values())
        self._adapters[concept] = name if delta.layers else None

    def _add_placeholder(self, vectors: Mapping[str, Any]) -> str:
        """Return a placeholder token with these embeddings; an unused one saves a new row of the embedding tables."""
        name = next((name for name in self._unused if self._encoders[name] == set(vectors)), None)
        if name is None:
            name = f"atomdiffword{len(self._encoders)}"
            add_placeholder_token(self.pipe, name)
            self._encoders[name] = frozenset(vectors)
        else:
            self._unused.remove(name)
        set_token_embedding(self.pipe, name, vectors)
        return name

    def _unload_oldest(self) -> None:
        concept, name = self._adapters.popitem(last=False)
        del self._replacements[concept]
        if name is not None:
            unload_atoms(self.pipe, name)
        self._unused += self._placeholders.pop(concept, ())
