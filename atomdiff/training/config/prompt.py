"""What of a run learns about text: the subjects' trigger words, and the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated

from atomdiff.pipelines.token_names import group_placeholder_tokens, placeholder_tokens
from atomdiff.training.config.subject import Subject, SubjectConfig, read_subjects
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, NonNegativeFloat, PositiveInt, Range
from atomdiff.utils.paths import PathText
from atomdiff.utils.text_files import check_text
from atomdiff.utils.untrusted import MAX_TRIGGER_WORDS


@dataclass(frozen=True, kw_only=True)
class TextConfig(ConfigGroup):
    """Token embeddings and text encoders."""

    train_token: bool = True
    """Train the token embedding of the trigger word (textual inversion), without weight decay; it is saved in the
    concept file."""
    num_vectors: PositiveInt = 1
    """Token embeddings per trigger word. Several are initialized from the tokens of initializer_token if it has as
    many, else from their mean with a little noise. Each takes the place of one token in prompts."""
    token_learning_rate: NonNegativeFloat | None = None
    """Learning rate of token embeddings. Default: that of the optimizer."""
    train_text_encoder_ti_frac: Annotated[float, Range(0, 1)] = 1.0
    """Fraction of the steps, from the start, in which token embeddings are trained; after it they are frozen."""
    train_text_encoder: bool = False
    """Train the text encoder too (both text encoders of SDXL)."""
    text_encoder_adapter: PathText | None = None
    """What to train in the text encoders; same choices as adapter. Default: filter atoms in the attention layers, with
    the UNet adapter's settings if that is one of filter atoms; all weights with adapter "full"."""
    text_encoder_lr: NonNegativeFloat | None = None
    """Learning rate of the text encoders. Default: learning_rate."""

    def check(self) -> None:
        """Check that what is set is used."""
        needs = dict.fromkeys(("num_vectors", "train_text_encoder_ti_frac"), "train_token")
        needs |= dict.fromkeys(("text_encoder_adapter", "text_encoder_lr"), "train_text_encoder")
        for name, needed in needs.items():
            if getattr(self, name) != getattr(TextConfig, name) and not getattr(self, needed):
                raise UserError(f"{name}={getattr(self, name)!r}: expected {needed}=True with it")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(TextConfig, SubjectConfig):
    """Several subjects."""

    concepts_list: PathText | None = None
    """YAML or JSON file with several subjects, in place of instance_data_dir: a list of mappings with
    instance_data_dir and, where they differ from this run's options, class_name, trigger_word, initializer_token,
    instance_prompt, class_prompt, class_data_dir, validation_data_dir and repeats. Each subject is trained in a
    run of its own, in a subfolder of output_dir."""
    one_file: bool = False
    """Train all subjects of concepts_list in one run, into one concept file with a trigger word for each."""

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """The subjects to train.

        Raises:
            UserError: `concepts_list` is not what it should be.
        """
        usual = {field.name: getattr(self, field.name) for field in fields(Subject)}
        if self.concepts_list is None:
            return (Subject(**usual),)
        return tuple(Subject(**{**usual, **entry}) for entry in read_subjects(Path(self.concepts_list)))

    @property
    def name(self) -> str:
        """Name of what the run writes: that of the folder of instance images, or of the list of concepts."""
        return self.subjects[0].name if self.concepts_list is None else Path(self.concepts_list).stem

    @property
    def trigger_phrase(self) -> str:
        """What to write in prompts: trigger word and class of every subject."""
        return ", ".join(subject.phrase for subject in self.subjects)

    def check(self) -> None:
        """Check that the subjects can be told apart."""
        if (self.instance_data_dir is None) == (self.concepts_list is None):
            found = "neither of them" if self.instance_data_dir is None else "both"
            raise UserError(f"expected instance_data_dir, or concepts_list for several subjects; found {found}")
        if self.validation_data_dir and self.concepts_list is not None:
            expected = "expected one for each subject, in the entries of concepts_list"
            raise UserError(f"validation_data_dir={self.validation_data_dir!r}: {expected}")
        if self.one_file and self.concepts_list is None:
            raise UserError("one_file=True: expected several subjects in a concepts_list")
        if self.one_file or self.concepts_list is None:
            self._check_trigger_words([subject.trigger_word for subject in self.subjects])
        for subject in self.subjects:
            if self.train_token and not (subject.initializer_token or subject.class_name):
                expected = "what the images show, in one word such as mug, or an initializer_token"
                raise UserError(f"class_name={subject.class_name!r}: expected {expected} (or train_token false)")
            for name in ("class_name", "trigger_word", "initializer_token"):
                check_text(f"{name}={getattr(subject, name)!r}", getattr(subject, name) or "")
            check_prompt("instance_prompt", subject.instance_prompt, subject)
        for name, what in (("trigger_word", "a word of its own"), ("name", "a folder of another name")):
            values = [getattr(subject, name) for subject in self.subjects]
            repeated = next((value for value in values if values.count(value) > 1), None)
            if repeated is not None and (self.one_file or name == "name"):
                raise UserError(f"{self.concepts_list}: {name}={repeated!r} is that of two subjects; give each {what}")

    def _check_trigger_words(self, words: Sequence[str]) -> None:
        """Check the trigger words of one concept."""
        if len(words) * self.num_vectors > MAX_TRIGGER_WORDS:
            expected = f"at most {MAX_TRIGGER_WORDS} vectors in a concept, found {len(words)} words"
            raise UserError(f"num_vectors={self.num_vectors}: expected {expected}")
        if len({word.lower() for word in words}) < len(set(words)):
            raise UserError(f"found the trigger words {', '.join(words)}: CLIP ignores case; choose others")
        tokens = [token for word in words for token in placeholder_tokens(word, self.num_vectors)]
        if self.train_token and len(group_placeholder_tokens(tokens)) < len(set(words)):
            found = f"the trigger words {', '.join(words)}"
            raise UserError(f"found {found}: sks and sks_1 are tokens of one word; choose others")
        within = [(a, b) for a in words for b in words if a != b and a.lower() in b.lower()]
        if self.num_vectors > 1 and within:
            (short, long), *_ = within
            found = f"trigger_word={short!r} is part of trigger_word={long!r}"
            raise UserError(
                f"{found}; with num_vectors, pipelines would replace it within the longer word: choose another"
            )


def check_prompt(name: str, prompt: str, subject: Subject) -> None:
    """Check that a prompt can be filled in.

    Raises:
        UserError: It names a class, and the subject has none; or it is no text.
    """
    check_text(f"{name}={prompt!r}", prompt)
    if "{class_name}" in prompt and not subject.class_name:
        raise UserError(f"{name}={prompt!r}: expected a class_name for it, or a prompt without {{class_name}}")
