"""The concepts of a sampling job that are loaded in the pipeline: the most recently used ones."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _LoadedSource:
    """What a concept is called in the pipeline."""

    adapter_name: str | None
    """Its adapter; None: it has token embeddings alone."""
    replacements: Mapping[str, str]
    """Trigger word -> the placeholder tokens to write for it."""
    placeholders: Sequence[str] = ()
    """Its placeholder tokens, for other concepts to use afterwards."""


class AdapterCache:
    """Loads the concepts that a batch uses and unloads those that were not used for longest.

    Each trigger word gets a placeholder token of its own, so that thousands of concepts can all be called "sks", and a
    prompt without concepts sees what the base knows by that word.

    Args:
        pipe: a pipeline without concepts.
        max_loaded: concepts that stay loaded, unless one batch needs more; None: `MAX_LOADED`.
    """

    def __init__(self, pipe: Any, max_loaded: int | None = None) -> None:
        self.pipe = pipe
        self.max_loaded = MAX_LOADED if max_loaded is None else max_loaded
        self._loaded: OrderedDict[ConceptSource, _LoadedSource] = OrderedDict()  # least recently used first
        self._encoders: dict[str, frozenset[str]] = {}  # placeholder token -> text encoders in which it has a vector
        self._unused: list[str] = []  # placeholder tokens without a concept
        self._num_loads = 0
        self._active: Mapping[str, AdapterWeight] | None = None  # what is merged into the weights

    @contextmanager
    def use(
        self,
        requests: Sequence[PromptRequest],
        *,
        progress: Sequence[float] | None = None,
        merge: bool = True,
        components: Collection[str] | None = None,
    ) -> Iterator[None]:
        """Make a `with` block in which the pipeline takes one prompt per request and applies its concepts.

        Args:
            requests: one a sample of the batch.
            progress: share of its denoising steps that each sample has done, where these differ; None: weights by step
                follow the pipeline's scheduler.
            merge: write the concepts into the weights where all requests have the same.
            components: the models that are called meanwhile, such as "unet"; None: all.

        Raises:
            UserError: a concept cannot be loaded, or not with its weight.
        """
        self._load_all(list(dict.fromkeys(concept for request in requests for concept, _ in request.concepts)))
        samples: list[dict[str, AdapterWeight]] = [
            {name: weight for concept, weight in request.concepts if (name := self._loaded[concept].adapter_name)}
            for request in requests
        ]
        if progress is not None:
            samples = [
                {name: weight.at_step(share) for name, weight in sample.items()}
                for sample, share in zip(samples, progress, strict=True)
            ]
        if not merge or any(sample != samples[0] for sample in samples):
            if self._active != {} and not all(concept.is_atoms for concept in self._loaded):
                self._set_active({})  # other adapters would act on all samples
            with mixed_batch(self.pipe, samples, components=components):
                yield
            return
        if samples[0] != self._active:
            self._set_active(samples[0])
        yield

    def _set_active(self, weights: Mapping[str, AdapterWeight]) -> None:
        self._active = None  # if it fails, the pipeline is restored
        set_active(self.pipe, weights)
        self._active = weights

    def replace_trigger_words(self, request: PromptRequest, text: str) -> str:
        """Return a text of a request that is in use, with placeholder tokens for its trigger words."""
        replacements = {concept: self._loaded[concept].replacements for concept, _ in request.concepts}
        return request.replace_trigger_words(text, replacements)

    def _load_all(self, concepts: Sequence[ConceptSource]) -> None:
        for concept in concepts:
            if concept in self._loaded:
                self._loaded.move_to_end(concept)
        for concept in concepts:
            if concept not in self._loaded:
                while len(self._loaded) >= max(self.max_loaded, len(concepts)):
                    self._unload_oldest()
                try:
                    self._loaded[concept] = self._load(concept)
                except UserError as error:
                    raise UserError(f"the concept {concept.name!r} ({concept.path}): {error}") from error

    def _load(self, concept: ConceptSource) -> _LoadedSource:
        self._active = None  # loading and unloading restore the weights
        self._num_loads += 1
        name = f"{re.sub(r'[^A-Za-z0-9_]', '_', concept.name)[:_MAX_NAME_LENGTH]}-{self._num_loads}"
        if concept.read is None:
            load_concept(self.pipe, concept.path, name, trigger_word=concept.new_trigger_word)
            return _LoadedSource(name, {word: word for word in concept.trigger_words})
        contents = concept.read()
        tokens, left_out = fitting_tokens(self.pipe, contents.tokens)
        if contents.layers:
            load_concept(self.pipe, replace(contents, tokens={}), name)
        warn_of_left_out(concept.name, left_out)
        placeholders = {token: self._add_placeholder(vectors) for token, vectors in tokens.items()}
        groups = {token: [token] for token in placeholders} | group_placeholder_tokens(placeholders)
        joined = {word: " ".join(placeholders[token] for token in group) for word, group in groups.items()}
        replacements = {word: joined.get(word, word) for word in concept.trigger_words}
        return _LoadedSource(name if contents.layers else None, replacements, [*placeholders.values()])

    def _add_placeholder(self, vectors: Mapping[str, Any]) -> str:
        """Return a placeholder token with these embeddings; an unused one saves a new row of the embedding tables."""
        token = next((token for token in self._unused if self._encoders[token] == vectors.keys()), None)
        if token is None:
            token = f"atomdiffword{len(self._encoders)}"
            add_placeholder_token(self.pipe, token)
            self._encoders[token] = frozenset(vectors)
        else:
            self._unused.remove(token)
        set_token_embedding(self.pipe, token, vectors)
        return token

    def _unload_oldest(self) -> None:
        _, loaded = self._loaded.popitem(last=False)
        if loaded.adapter_name is not None:
            unload_atoms(self.pipe, loaded.adapter_name)
        self._unused += loaded.placeholders
