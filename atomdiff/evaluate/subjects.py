"""The subjects of an evaluation: a concept each, with what prompts call it, its prompts and its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
        UserError: one of them is missing or cannot be used, or two concepts have one name.
    """
    phrases = config.trigger_phrases or (None,) * len(config.concepts)
    weights = command_line_weights(config.concepts, config.weights, ())
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
    class_name = config.class_name or " ".join(word for word in phrase.split() if word not in words) or None
    found = _find(config, protocol, name, class_name)
    if not phrase and not words:
        raise UserError(f"the concept {name!r} has no trigger phrase: give --trigger_phrases, such as 'sks dog'")
    prompts = found.prompts[: config.num_prompts]
    suite = PromptSuite(
        found.class_name,
        tuple(prompt.text for prompt in prompts),
        protocol.unrelated_prompts,
        protocol.prior_prompts,
        tuple(prompt.labels for prompt in prompts),
        images_per_prompt=config.images_per_prompt or protocol.images_per_prompt,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    path = Path(concept) if source is None else source.path
    if source is not None:
        source.check_weight(weight)
    elif weight != AdapterWeight():
        raise UserError(f"weights: {name} is a fully fine-tuned pipeline, which has no adapter weight; give 1")
    return Subject(
        name, path, source, weight, phrase or f"{words[0]} {found.class_name}", suite, found.references, found.kind
    )


def _find(config: EvaluateConfig, protocol: Protocol, name: str, class_name: str | None) -> ProtocolSubject:
    data = Path(config.reference_data_dir)
    if protocol.layout == "dreambench_plus":
        return dreambench_plus.read_subject(name, data)
    return protocol.subject(name, class_name, data, alone=len(config.concepts) == 1)
