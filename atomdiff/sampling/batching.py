"""The lines of a sampling job with the concepts that each names, packed into batches that share what can be shared."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from atomdiff.concepts import hub
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, DeltaFile, read_delta_file, read_tensors, split_token_key
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.lora_file import is_lora_file, trigger_phrase
from atomdiff.concepts.peft_folder import LEARNED_EMBEDS_NAME
from atomdiff.pipelines.adapter_weight import AdapterWeight, command_line_weights
from atomdiff.pipelines.load import renamed_tokens
from atomdiff.pipelines.prompt_syntax import has_word, replace_words, split_tags, weight_as_json
from atomdiff.pipelines.scheduler import ScheduleConfig, trained_schedule
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Concept:
    """A concept of a job."""

    name: str
    """What tags call it."""
    file: str
    """Its file or directory, for people to read."""
    path: Path
    """Where it is on this disk."""
    words: tuple[str, ...]
    """Its trigger words, as prompts have them."""
    phrase: str = ""
    """What to write in a prompt to get it."""
    read: Callable[[], DeltaFile] | None = None
    """Gives what it holds, its tokens under `words`; None: it is a LoRA file or a directory written by PEFT."""
    trigger_word: str | None = None
    """What it was asked to be called in prompts instead of its own word."""

    @cached_property
    def sha256(self) -> str:
        """Hash of its contents."""
        return hash_file(self.path)

    @cached_property
    def schedule(self) -> ScheduleConfig | None:
        """What it was trained to predict; None: nothing is known."""
        return trained_schedule(self.path)


def schedules(concepts: Iterable[tuple[Concept, AdapterWeight]]) -> list[tuple[str, ScheduleConfig]]:
    """The names and schedules of the concepts that have a strength, and of which they are known."""
    return [(c.name, c.schedule) for c, strength in concepts if strength.weight and c.schedule is not None]


@dataclass(frozen=True, eq=False)
class Line:
    """A prompt with its concepts."""

    prompt: str
    """As it was written."""
    text: str
    """What is left of it without tags."""
    concepts: tuple[tuple[Concept, AdapterWeight], ...] = ()
    """What it wears, in the order of the command line, then of the tags."""
    tagged: frozenset[str] = frozenset()
    """Names in its tags."""

    @cached_property
    def facts(self) -> str:
        """The concepts as pictures tell them, in JSON."""
        return json.dumps(
            [
                {
                    "file": concept.file,
                    "sha256": concept.sha256,
                    "weight": weight_as_json(strength),
                    "trigger_word": concept.trigger_word,
                }
                for concept, strength in self.concepts
            ]
        )

    def spell(self, text: str, words: Mapping[Concept, Mapping[str, str]]) -> str:
        """A text with other words for the trigger words of the concepts.

        A word that several concepts share is replaced where it stands in the phrase of only one of them.

        Args:
            text: the prompt's text, or its negative prompt.
            words: concept -> trigger word -> what takes its place.
        """
        concepts = [concept for concept, _ in self.concepts]
        owners = Counter(word.lower() for concept in concepts for word in concept.words)
        phrases = Counter(concept.phrase.lower() for concept in concepts)
        found = {}
        for concept in concepts:
            shared = [word for word in concept.words if owners[word.lower()] > 1]
            found.update({word: words[concept][word] for word in concept.words if word not in shared})
            if phrases[concept.phrase.lower()] == 1 and any(has_word(concept.phrase, word) for word in shared):
                found[concept.phrase] = replace_words(concept.phrase, words[concept])
        return replace_words(text, found)


def given_concept(source: str, trigger_word: str | None = None) -> Concept:
    """A concept from a file, a LoRA file of another program, a directory written by PEFT, or the Hub ("user/repo").

    Args:
        source: where it is.
        trigger_word: word to use in prompts instead of its own.

    Raises:
        UserError: nothing is there, it is damaged, or it has not exactly one word to rename.
    """
    path, found = hub.locate(source)
    file, name = Path(source).name, found.removesuffix(CONCEPT_SUFFIX)
    if path.is_dir():
        embeddings = path / LEARNED_EMBEDS_NAME
        own = {split_token_key(key)[0] for key in (read_tensors(embeddings)[0] if embeddings.is_file() else ())}
        words = tuple(sorted(own)) if trigger_word is None else (trigger_word,)
        return Concept(name, file, path, words, trigger_word=trigger_word)
    if is_lora_file(path):
        if trigger_word is not None:
            raise UserError(f"trigger_word={trigger_word!r}: {file} is a LoRA file, which has no word to rename")
        return Concept(name.removesuffix(".safetensors"), file, path, (), trigger_phrase(path))
    delta = read_delta_file(path)
    tokens = renamed_tokens(delta.tokens, trigger_word)
    phrase = replace_words(delta.trigger_phrase, dict(zip(delta.tokens, tokens, strict=True)))
    known = replace(delta, tokens=tokens)
    return Concept(name, file, path, tuple(tokens), phrase, lambda: known, trigger_word)


def given_concepts(
    sources: Sequence[str], weights: Sequence[Any] = (), trigger_words: Sequence[str] = ()
) -> list[tuple[Concept, AdapterWeight]]:
    """The concepts that a command line gives, each with its strength.

    Args:
        sources: where they are, as `given_concept` takes it.
        weights: strengths as `AdapterWeight.read` takes them; none: 1 each.
        trigger_words: words to use instead of their own; none: their own.

    Raises:
        UserError: a concept cannot be used, or not with its strength.
    """
    strengths = command_line_weights(sources, weights, trigger_words)
    words: Sequence[str | None] = trigger_words or [None] * len(sources)
    given = [given_concept(source, word) for source, word in zip(sources, words, strict=True)]
    for concept, strength in zip(given, strengths, strict=True):
        _check_strength(concept, strength)
    return list(zip(given, strengths, strict=True))


def library_concept(library: ConceptLibrary, name: str) -> Concept:
    """A concept of a library; it is read when it is needed.

    Raises:
        UserError: there is none of that name.
    """
    info = library.info(name)
    file = info.name + (".safetensors" if info.is_lora else CONCEPT_SUFFIX)
    read = None if info.is_lora else lambda: library[name]
    return Concept(name, file, info.path, info.trigger_words, info.trigger_phrase, read)


def read_lines(
    prompts: Iterable[str],
    given: Sequence[tuple[Concept, AdapterWeight]] = (),
    library: ConceptLibrary | None = None,
) -> list[Line]:
    """Find out which concepts each prompt wears.

    Args:
        prompts: with tags as `split_tags` takes them; each names a concept of the library, or one of `given`, which
            then has the tag's strength there.
        given: concepts that all prompts wear.
        library: where other concepts come from.

    Raises:
        UserError: a tag cannot be read, nobody has its name, a strength does not fit its concept, or a prompt has a
            word that two of its concepts have.
    """
    own = Counter(concept.name for concept, _ in given)
    for concept, strength in given:
        _check_strength(concept, strength)
    found = {concept.name: concept for concept, _ in given}
    lines = []
    for prompt in prompts:
        text, tags = split_tags(prompt)
        for name, strength in tags.items():
            if own[name] > 1:
                raise UserError(f"the prompt {prompt!r} names {name!r}, but {own[name]} concepts given are called so")
            if name not in found:
                found[name] = _look_up(name, prompt, library, list(own))
            _check_strength(found[name], strength)
        worn = [(concept, tags.get(concept.name, strength)) for concept, strength in given]
        worn += [(found[name], strength) for name, strength in tags.items() if name not in own]
        line = Line(prompt, text, tuple(worn), frozenset(tags))
        _check_words(line)
        lines.append(line)
    return lines


def in_order(items: Sequence[Item], line_of: Callable[[Item], Line]) -> list[Item]:
    """Bring items of the same concepts together, those that wear them alike side by side; else in the order given."""
    first: dict[str, int] = {}
    for place, item in enumerate(items):
        first.setdefault(line_of(item).facts, place)

    def key(item: Item) -> Any:
        line = line_of(item)
        return sorted(concept.name for concept, _ in line.concepts), first[line.facts]

    return sorted(items, key=key)


def share_of(items: Sequence[Item], process: int, processes: int) -> Sequence[Item]:
    """The part of ordered items that one of several processes takes: neighbours, which have concepts in common."""
    least, more = divmod(len(items), processes)
    start = process * least + min(process, more)
    return items[start : start + least + (process < more)]


def pack(items: Sequence[Item], line_of: Callable[[Item], Line], batch_size: int) -> list[list[Item]]:
    """Cut ordered items into batches: whole ones of items alike, and mixed ones of what is left.

    Items with concepts of other methods than atoms, which cannot mix, get batches of their own.
    """
    batches: list[list[Item]] = []
    rest: list[Item] = []
    for _, group in groupby(items, key=lambda item: line_of(item).facts):
        alike = list(group)
        mixes = all(concept.read is not None for concept, _ in line_of(alike[0]).concepts)
        whole = len(alike) // batch_size * batch_size if mixes else len(alike)
        batches += [alike[start : min(start + batch_size, whole)] for start in range(0, whole, batch_size)]
        rest += alike[whole:]
        while len(rest) >= batch_size:
            batches.append(rest[:batch_size])
            rest = rest[batch_size:]
    return [*batches, rest] if rest else batches


def warn_of_prompts(pipe: Any, lines: Iterable[Line]) -> None:
    """Warn of prompts that are longer than a base reads, and of concepts that a tag names but no word of a prompt.

    Args:
        pipe: the base, without concepts.
        lines: those that are to be drawn.
    """
    lines = list(dict.fromkeys(lines))
    longest = pipe.tokenizer.model_max_length
    for line in lines:
        groups = [group for concept, _ in line.concepts for group in group_placeholder_tokens(concept.words).items()]
        one_token = {word: " ".join("a" for _ in vectors) for word, vectors in groups}
        tokens = len(pipe.tokenizer(replace_words(line.text, one_token), verbose=False).input_ids)
        if tokens > longest:
            shown = textwrap.shorten(line.prompt, 60)
            warnings.warn(f"the base reads {longest} of the {tokens} tokens of {shown!r}: shorten it", stacklevel=2)
    told = set()
    for line in lines:
        for concept, strength in line.concepts:
            if concept.name not in line.tagged or not (concept.words and strength.weight) or concept in told:
                continue
            if not any(has_word(line.text, word) for word in concept.words):
                told.add(concept)
                wanted = concept.phrase or concept.words[0]
                warnings.warn(
                    f"the prompt {line.prompt!r} wears {concept.name!r}, but does not say {wanted!r}, by which it is "
                    "called: add that if the concept does not show",
                    stacklevel=2,
                )


def _look_up(name: str, prompt: str, library: ConceptLibrary | None, given: Sequence[str]) -> Concept:
    if library is not None:
        return library_concept(library, name)
    there = f"the concepts given are: {', '.join(map(repr, given))}" if given else "no concepts are given"
    raise UserError(f"the prompt {prompt!r} names {name!r}, but there is no library and {there}; give --library FOLDER")


def _check_strength(concept: Concept, strength: AdapterWeight) -> None:
    """Refuse what would fail when pictures have been drawn already."""
    if not (strength.blocks or strength.steps):
        return
    if concept.read is None:
        raise UserError(f"{concept.file} is no concept of atoms: only those can be weighted by block and step")
    if strength.blocks:
        strength.check(concept.name, concept.read().layers)


def _check_words(line: Line) -> None:
    """Refuse a text in which a word stands for two concepts."""
    owners = [(word.lower(), concept.name) for concept, _ in line.concepts for word in concept.words]
    left = line.spell(line.text, {concept: dict.fromkeys(concept.words, "") for concept, _ in line.concepts})
    for word, count in Counter(word for word, _ in owners).items():
        if count > 1 and has_word(left, word):
            names = " and ".join(repr(name) for other, name in owners if other == word)
            phrases = sorted({repr(concept.phrase) for concept, _ in line.concepts if has_word(concept.phrase, word)})
            raise UserError(
                f"the prompt {line.prompt!r} says {word!r}, the trigger word of {names}: call each by its own phrase "
                f"({', '.join(phrases) or 'they have none'}), or give one with --concepts and --trigger_words"
            )
