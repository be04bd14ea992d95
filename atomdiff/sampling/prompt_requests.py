"""Prompts with the concepts that each one uses, by tags or for all prompts."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.prompt_syntax import has_word, replace_words, split_tags, weight_as_json
from atomdiff.pipelines.scheduler import ScheduleConfig
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.sampling.concept_source import ConceptSource, library_source
from atomdiff.utils.errors import UserError


@dataclass(frozen=True, eq=False)
class PromptRequest:
    """A prompt with the concepts that it uses."""

    prompt: str
    """As the user wrote it."""
    text: str
    """The prompt without its tags."""
    concepts: tuple[tuple[ConceptSource, AdapterWeight], ...] = ()
    """Concepts with their weights: first those of all prompts, then those of the tags."""
    tagged: frozenset[str] = frozenset()
    """Concept names in the tags."""
    schedules: tuple[tuple[str, ScheduleConfig], ...] = ()
    """Names and schedules of what it is compared with, and therefore generated like, without these concepts."""

    @cached_property
    def concepts_json(self) -> str:
        """The concepts and their weights in JSON, for image metadata; equal for requests that share weights."""
        return json.dumps(
            [
                {
                    "file": concept.file,
                    "sha256": concept.sha256,
                    "weight": weight_as_json(weight),
                    "trigger_word": concept.new_trigger_word,
                }
                for concept, weight in self.concepts
            ]
        )

    def replace_trigger_words(self, text: str, replacements: Mapping[ConceptSource, Mapping[str, str]]) -> str:
        """Replace the trigger words of the concepts in a text.

        A word that several concepts share is replaced where it stands in the phrase of only one of them.

        Args:
            text: the request's text, or its negative prompt.
            replacements: concept -> trigger word -> what takes its place.
        """
        concepts = [concept for concept, _ in self.concepts]
        owners = Counter(word.lower() for concept in concepts for word in concept.trigger_words)
        phrases = Counter(concept.trigger_phrase.lower() for concept in concepts)
        replaced: dict[str, str] = {}
        for concept in concepts:
            phrase, of_concept = concept.trigger_phrase, replacements[concept]
            shared = [word for word in concept.trigger_words if owners[word.lower()] > 1]
            replaced |= {word: of_concept[word] for word in concept.trigger_words if word not in shared}
            if phrases[phrase.lower()] == 1 and any(has_word(phrase, word) for word in shared):
                replaced[phrase] = replace_words(phrase, of_concept)
        return replace_words(text, replaced)


def read_requests(
    prompts: Iterable[str],
    concepts: Sequence[tuple[ConceptSource, AdapterWeight]] = (),
    library: ConceptLibrary | None = None,
) -> list[PromptRequest]:
    """Find the concepts that each prompt uses.

    Args:
        prompts: with tags as `split_tags` takes them; each tag names a concept of the library, or one of `concepts`,
            whose weight it sets for this prompt.
        concepts: concepts that all prompts use.
        library: where the other concepts of the tags come from.

    Raises:
        UserError: a tag cannot be read, its concept is unknown, a weight does not fit its concept, or a prompt has a
            trigger word of two of its concepts.
    """
    names = Counter(concept.name for concept, _ in concepts)
    for concept, weight in concepts:
        concept.check_weight(weight)
    sources = {concept.name: concept for concept, _ in concepts}
    requests = []
    for prompt in prompts:
        text, tags = split_tags(prompt)
        for name, weight in tags.items():
            if names[name] > 1:
                raise UserError(f"the prompt {prompt!r} names {name!r}, but {names[name]} of --concepts have that name")
            if name not in sources:
                sources[name] = _find_source(name, prompt, library, list(names))
            sources[name].check_weight(weight)
        used = [(concept, tags.get(concept.name, weight)) for concept, weight in concepts]
        used += [(sources[name], weight) for name, weight in tags.items() if name not in names]
        request = PromptRequest(prompt, text, tuple(used), frozenset(tags))
        _check_trigger_words(request)
        requests.append(request)
    return requests


def warn_about_prompts(pipe: Any, requests: Iterable[PromptRequest]) -> None:
    """Warn about prompts that are too long for the base, and about tags whose trigger word the prompt lacks.

    Args:
        pipe: the base, without concepts.
        requests: the prompts with their concepts.
    """
    warned: set[ConceptSource] = set()
    for request in dict.fromkeys(requests):
        limit, length = pipe.tokenizer.model_max_length, _num_tokens(pipe, request)
        if length > limit:
            start = textwrap.shorten(request.prompt, 60)
            warnings.warn(f"the base reads {limit} of the {length} tokens of {start!r}: shorten it", stacklevel=2)
        for concept, weight in request.concepts:
            words = concept.trigger_words
            if concept.name not in request.tagged or not (words and weight.weight) or concept in warned:
                continue
            if not any(has_word(request.text, word) for word in words):
                warned.add(concept)
                warnings.warn(
                    f"the prompt {request.prompt!r} uses {concept.name!r} without its trigger phrase "
                    f"{concept.trigger_phrase or words[0]!r}: add it if the concept does not show",
                    stacklevel=2,
                )


def _num_tokens(pipe: Any, request: PromptRequest) -> int:
    """Return the length of a prompt in tokens of the base, one for each vector of a trigger word."""
    groups = [group_placeholder_tokens(concept.trigger_words) for concept, _ in request.concepts]
    letters = {word: " ".join("a" for _ in tokens) for group in groups for word, tokens in group.items()}
    return len(pipe.tokenizer(replace_words(request.text, letters), verbose=False).input_ids)


def _find_source(name: str, prompt: str, library: ConceptLibrary | None, names: Sequence[str]) -> ConceptSource:
    if library is not None:
        return library_source(library, name)
    known = f"--concepts has {', '.join(map(repr, names))}" if names else "there are no --concepts"
    raise UserError(f"the prompt {prompt!r} names {name!r}, but {known} and no library; give --library FOLDER")


def _check_trigger_words(request: PromptRequest) -> None:
    """Refuse a text in which a word is the trigger word of two concepts."""
    concepts = [concept for concept, _ in request.concepts]
    owners = [(word.lower(), concept.name) for concept in concepts for word in concept.trigger_words]
    none = {concept: dict.fromkeys(concept.trigger_words, "") for concept in concepts}
    left = request.replace_trigger_words(request.text, none)
    for word, count in Counter(word for word, _ in owners).items():
        if count > 1 and has_word(left, word):
            names = " and ".join(repr(name) for other, name in owners if other == word)
            phrases = sorted({repr(c.trigger_phrase) for c in concepts if has_word(c.trigger_phrase, word)})
            raise UserError(
                f"the prompt {request.prompt!r} has {word!r}, the trigger word of {names}: write the phrase of each "
                f"({', '.join(phrases) or 'they have none'}), or rename one with --concepts and --trigger_words"
            )
