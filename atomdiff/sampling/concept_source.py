"""Concepts that a sampling job or an export uses: concept files, LoRA files, PEFT folders, Hub repositories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from atomdiff.concepts import hub
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX, ConceptFile, read_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.lora_file import is_lora_file, trigger_phrase
from atomdiff.concepts.peft_folder import LEARNED_EMBEDS_NAME
from atomdiff.concepts.token_keys import split_token_key
from atomdiff.pipelines.adapter_weight import AdapterWeight, command_line_weights
from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.pipelines.scheduler import ScheduleConfig, trained_schedule
from atomdiff.pipelines.token_names import rename_tokens
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.names import normalize_name
from atomdiff.utils.untrusted import read_safetensors_header

_CHOICE = "give the path of one (of a repository, hf download fetches it)"


@dataclass(frozen=True, eq=False)
class ConceptSource:
    """Where a concept comes from, and how prompts name it."""

    name: str
    """Name in prompt tags."""
    file: str
    """Name of its file or folder, for messages and image metadata."""
    path: Path
    """Its path on this disk."""
    trigger_words: tuple[str, ...]
    """Its trigger words, as prompts have them."""
    trigger_phrase: str = ""
    """What to write in a prompt to get it."""
    read: Callable[[], ConceptFile] | None = None
    """Returns its contents, its tokens named as in `trigger_words`; None: it is a LoRA file or a PEFT folder."""
    new_trigger_word: str | None = None
    """Word that replaces its own trigger word in prompts; None: its own is used."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its contents."""
        return hash_file(self.path)

    @cached_property
    def schedule(self) -> ScheduleConfig | None:
        """What it was trained to predict; None: unknown."""
        return trained_schedule(self.path)

    @property
    def is_atoms(self) -> bool:
        """Whether it is a concept of atoms, and no LoRA file or PEFT folder."""
        return self.read is not None

    def check_weight(self, weight: AdapterWeight) -> None:
        """Refuse a weight that this concept cannot have, before anything is loaded.

        Raises:
            UserError: it is no number and the concept is not one of atoms, or a block holds none of its layers.
        """
        if not weight.is_plain and self.read is None:
            raise UserError(
                f"{self.file} is not an atom concept: only those can be weighted by block and step, or kept in part"
            )
        if weight.blocks and self.read is not None:
            weight.check(self.name, self.read().layers)


def schedules(concepts: Iterable[tuple[ConceptSource, AdapterWeight]]) -> list[tuple[str, ScheduleConfig]]:
    """Return names and training schedules of the concepts with a weight other than 0, where they are known."""
    return [(c.name, c.schedule) for c, weight in concepts if weight.weight and c.schedule is not None]


def open_source(source: str, trigger_word: str | None = None) -> ConceptSource:
    """Find a concept file, a LoRA file, a PEFT folder, or a repository on the Hub ("user/repo").

    Args:
        source: path or repository.
        trigger_word: word to use in prompts instead of the concept's own.

    Raises:
        UserError: nothing is there, it is damaged, or it does not have exactly one trigger word to rename.
    """
    path, found_name = hub.locate(source, choice=_CHOICE)
    file, name = Path(source).name, normalize_name(found_name.removesuffix(CONCEPT_SUFFIX))
    if path.is_dir():
        embeddings = path / LEARNED_EMBEDS_NAME
        keys = read_safetensors_header(embeddings)[1] if embeddings.is_file() else ()
        words = tuple(sorted({split_token_key(key)[0] for key in keys})) if trigger_word is None else (trigger_word,)
        return ConceptSource(name, file, path, words, new_trigger_word=trigger_word)
    if is_lora_file(path):
        if trigger_word is not None:
            raise UserError(f"trigger_word={trigger_word!r}: {file} is a LoRA file and has no trigger word to rename")
        return ConceptSource(name.removesuffix(".safetensors"), file, path, (), trigger_phrase(path))
    contents = read_concept_file(path)
    tokens = rename_tokens(contents.tokens, trigger_word)
    phrase = replace_words(contents.trigger_phrase, dict(zip(contents.tokens, tokens, strict=True)))
    renamed = replace(contents, tokens=tokens)
    return ConceptSource(name, file, path, tuple(tokens), phrase, lambda: renamed, trigger_word)


def open_sources(
    sources: Sequence[str], weights: Sequence[Any] = (), trigger_words: Sequence[str] = ()
) -> list[tuple[ConceptSource, AdapterWeight]]:
    """Find the concepts of a command line, each with its weight.

    Args:
        sources: as for `open_source`.
        weights: as `AdapterWeight.read` takes them, one per concept; empty: 1 each.
        trigger_words: as for `open_source`, one per concept; empty: their own.

    Raises:
        UserError: a concept cannot be used, or not with its weight.
    """
    read_weights = command_line_weights(sources, weights, trigger_words)
    words: Sequence[str | None] = trigger_words or [None] * len(sources)
    concepts = [open_source(source, word) for source, word in zip(sources, words, strict=True)]
    for concept, weight in zip(concepts, read_weights, strict=True):
        concept.check_weight(weight)
    return list(zip(concepts, read_weights, strict=True))


def library_source(library: ConceptLibrary, name: str) -> ConceptSource:
    """Find a concept in a library; its tensors are read when they are needed.

    Raises:
        UserError: the library has no concept of that name.
    """
    info = library.info(name)
    file = info.name + (".safetensors" if info.is_lora else CONCEPT_SUFFIX)
    read = None if info.is_lora else lambda: library[name]
    return ConceptSource(name, file, info.path, info.trigger_words, info.trigger_phrase, read)
