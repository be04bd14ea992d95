"""The subjects of an evaluation: a concept each, with what prompts call it, its prompts and its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atomdiff.concepts.hub import concepts_in
from atomdiff.concepts.training_record import trained_class
from atomdiff.evaluate import dreambench_plus
from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.protocol import Protocol, ProtocolSubject
from atomdiff.evaluate.suite import PromptSuite
from atomdiff.pipelines.adapter_weight import AdapterWeight, command_line_weights
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.sampling.concept_source import ConceptSource, open_source
from atomdiff.sampling.prompt_requests import PromptRequest
from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A concept to measure."""

    name: str
    """Name of the concept and of its subject."""
    path: Path
    """The concept's file or folder."""
    concept: ConceptSource | None
    """The concept; None: `path` is a fully fine-tuned pipeline."""
    weight: AdapterWeight
    """Its adapter weight."""
    trigger_phrase: str
    """What prompts call the subject."""
    suite: PromptSuite
    """What is generated."""
    references: tuple[Path, ...]
    """Images of the subject."""
    kind: str
    """Kind of subject in the protocol."""

    def request(self, prompt: str) -> PromptRequest:
        """Return a prompt that uses the concept."""
        used = () if self.concept is None else ((self.concept, self.weight),)
        return PromptRequest(prompt, prompt, used)


def open_subjects(config: EvaluateConfig, protocol: Protocol) -> list[Subject]:
    """Find the concepts, their prompts and their images.

    Raises:
        UserError: one of them is missing or cannot be used, its phrase or class is unknown, or two concepts have one
            name.
    """
    config = replace(config, concepts=tuple(each for given in config.concepts for each in concepts_in(given)))
    phrases = config.trigger_phrases or (None,) * len(config.concepts)
    weights = command_line_weights(config.concepts, config.weights, ())
    if len(phrases) != len(config.concepts):
        found = f"{len(phrases)} for {len(config.concepts)} concepts"
        raise UserError(f"trigger_phrases: expected one for each concept, or none; found {found}")
    subjects: dict[str, Subject] = {}
    for path, phrase, weight in zip(config.concepts, phrases, weights, strict=True):
        subject = _open_subject(config, protocol, path, phrase, weight)
        if subject.name in subjects:
            raise UserError(f"concepts: two are named {subject.name!r}; rename one, like its subject")
        subjects[subject.name] = subject
    return [*subjects.values()]


def _open_subject(
    config: EvaluateConfig, protocol: Protocol, concept: str, phrase: str | None, weight: AdapterWeight
) -> Subject:
    is_pipeline = (Path(concept) / "model_index.json").is_file()
    source = None if is_pipeline else open_source(concept)
    name = Path(concept).resolve().name if source is None else source.name
    words = [*group_placeholder_tokens(source.trigger_words)] if source else []
    phrase = phrase or (source.trigger_phrase if source else "")
    found = _find(config, protocol, name)
    path = Path(concept) if source is None else source.path
    class_name = found.class_name or _class_of(path, phrase, words)
    lacking = [] if phrase or words else ["trigger phrase: give --trigger_phrases, such as 'sks dog'"]
    lacking += [] if class_name else ["class: give --class_name, such as dog"]
    if lacking:
        raise UserError(f"the concept {name!r}: found no {', and no '.join(lacking)}")
    prompts = found.prompts[: config.num_prompts]
    suite = PromptSuite(
        class_name,
        tuple(prompt.text for prompt in prompts),
        protocol.unrelated_prompts,
        protocol.prior_prompts,
        tuple(prompt.labels for prompt in prompts),
        found.captions[: config.num_prompts],
        images_per_prompt=config.images_per_prompt or protocol.images_per_prompt,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    if source is not None:
        source.check_weight(weight)
    elif weight != AdapterWeight():
        raise UserError(f"weights: {name} is a fully fine-tuned pipeline, which has no adapter weight; give 1")
    return Subject(
        name, path, source, weight, phrase or f"{words[0]} {class_name}", suite, found.references, found.kind
    )


def _find(config: EvaluateConfig, protocol: Protocol, name: str) -> ProtocolSubject:
    data = Path(config.reference_data_dir)
    if protocol.layout == "dreambench_plus":
        found = dreambench_plus.read_subject(name, data)
        return replace(found, class_name=config.class_name, captions=()) if config.class_name else found
    return protocol.subject(name, config.class_name, data, alone=len(config.concepts) == 1)


def _class_of(path: Path, phrase: str, words: Sequence[str]) -> str:
    """Return the class of a concept's subject, empty if it is unknown.

    A phrase tells it only where the trigger words in it are known.
    """
    named = " ".join(word for word in phrase.split() if word not in words) if words else ""
    return named or trained_class(path) or ""
