"""Evaluation protocols: which subjects are generated from which prompts, as YAML files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from atomdiff.data.image_files import list_images
from atomdiff.evaluate.label_accuracy import LABEL_KINDS
from atomdiff.evaluate.suite import UNSEEN_FOLDER
from atomdiff.utils.assets import ASSETS, find_asset
from atomdiff.utils.errors import UserError
from atomdiff.utils.text_files import read_yaml
from atomdiff.utils.untrusted import list_some

PROTOCOLS = ASSETS / "configs" / "protocols"
SUBJECT = "{subject}"
LAYOUTS = ("folders", "dreambench_plus")


class Prompt(NamedTuple):
    """A prompt of a protocol."""

    text: str
    """The prompt."""
    labels: Mapping[str, str] = MappingProxyType({})
    """What it asks for, by kind, where an encoder can recognize that: {"scene": "snow"}."""


@dataclass(frozen=True)
class ProtocolSubject:
    """A subject of a protocol."""

    name: str
    """As its folder of images and its concept are named."""
    class_name: str
    """What it is, in the base's words; empty: unknown."""
    prompts: tuple[Prompt, ...]
    """Prompts, with `{subject}`."""
    references: tuple[Path, ...]
    """Its images."""
    kind: str = ""
    """Kind of subject, where the protocol has several."""
    captions: tuple[str, ...] = ()
    """The prompts as they were published, with the class; empty: it takes the place of `{subject}`."""


@dataclass(frozen=True)
class Protocol:
    """Prompts for kinds of subjects, and for what has nothing to do with them."""

    name: str
    """Of its file."""
    prompts: Mapping[str, tuple[Prompt, ...]]
    """Prompts by kind of subject, with `{subject}`; empty: they come with the images."""
    unrelated_prompts: tuple[str, ...] = ()
    """Prompts for drift, without `{subject}`; empty: it is not measured."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts for other individuals of the class, with `{subject}`; empty: prior similarity is not measured."""
    subjects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Class name, kind and labels of the training images (`seen`) by subject; empty: any subject can be evaluated."""
    images_per_prompt: int = 4
    """Images, each from a seed of its own, for a prompt of the subject or the class."""
    layout: str = "folders"
    """How the images are stored: a folder for each subject, or as DreamBench++ has them, with prompts."""

    def subject(self, name: str, class_name: str | None, data_dir: Path, alone: bool) -> ProtocolSubject:
        """Find a subject with its prompts and its images.

        Args:
            name: as the concept is named.
            class_name: what it is; None: as the protocol says.
            data_dir: a folder with a folder of images for each subject, or, of one that is evaluated alone, with its
                images. With a subfolder `unseen` the images in that are the references.
            alone: whether it is the only one.

        Raises:
            UserError: the protocol has no such subject, or there are no images of it.
        """
        if self.subjects and name not in self.subjects:
            raise UserError(
                f"the concept {name!r}: the protocol {self.name} has no such subject; it has "
                f"{list_some(sorted(self.subjects))}. Name the concept's file like its subject"
            )
        known = self.subjects.get(name, {})
        class_name = class_name or known.get("class_name", "")
        kind, seen = known.get("prompts") or next(iter(self.prompts)), set(known.get("seen", ()))
        prompts = tuple(prompt for prompt in self.prompts[kind] if seen.isdisjoint(prompt.labels.values()))
        return ProtocolSubject(name, class_name, prompts, _references(name, data_dir, alone), kind)


def load_protocol(name: str) -> Protocol:
    """Load a protocol by the name of one that comes with the project, or from a YAML file.

    Raises:
        UserError: there is no such protocol, or the file is not one.
    """
    shipped = {file.stem: file for file in sorted(PROTOCOLS.glob("*.yaml"))}
    file = shipped.get(name) or Path(find_asset(name))
    if not file.is_file():
        raise UserError(f"protocol={name!r}: expected a YAML file, or one of {', '.join(shipped)}")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping with prompts")
    return _parse_protocol(file, content)


def _parse_protocol(file: Path, content: Mapping[str, Any]) -> Protocol:
    known = {entry.name for entry in fields(Protocol)} - {"name"}
    if unknown := sorted(map(str, content.keys() - known)):
        raise UserError(f"{file}: there is no entry {unknown[0]!r} in a protocol; known are {', '.join(sorted(known))}")
    layout = content.get("layout", "folders")
    if layout not in LAYOUTS:
        raise UserError(f"{file}: layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    prompts = content.get("prompts", {} if layout == "dreambench_plus" else None)
    kinds = prompts if isinstance(prompts, dict) else {"any": prompts}
    if not kinds and layout != "dreambench_plus":
        raise UserError(f"{file}: prompts: found no kind of subjects; expected a list of prompts for each, or one list")
    by_kind = {str(kind): _labeled_prompts(file, f"prompts of {kind}", each) for kind, each in kinds.items()}
    optional = {name: content.get(name, []) for name in ("unrelated_prompts", "prior_prompts")}
    unrelated, prior = (
        _prompts(file, name, each, name == "prior_prompts") if each != [] else () for name, each in optional.items()
    )
    count = content.get("images_per_prompt", 4)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1000:
        raise UserError(f"{file}: images_per_prompt={count!r}: expected a whole number from 1 to 1000")
    subjects = _subjects(file, content.get("subjects", {}), by_kind)
    return Protocol(file.stem, by_kind, unrelated, prior, subjects, count, layout)


def _subjects(file: Path, found: Any, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, dict[str, Any]]:
    if not isinstance(found, dict):
        raise UserError(f"{file}: subjects: expected a mapping, such as dog2: {{class_name: dog}}")
    for name, subject in found.items():
        entries = subject if isinstance(subject, dict) and subject.keys() <= {"class_name", "prompts", "seen"} else {}
        kind: Any = entries.get("prompts", next(iter(prompts), None))
        if not isinstance(entries.get("class_name"), str) or kind not in [*prompts]:  # kind may be a list
            expected = f"expected its class_name and which prompts it gets: {', '.join(prompts)}"
            raise UserError(f"{file}: the subject {name!r}: found {subject!r}; {expected}")
        labels = {label for prompt in prompts[kind] for label in prompt.labels.values()}
        seen = entries.get("seen", [])
        if not isinstance(seen, list) or not all(isinstance(each, str) for each in seen) or set(seen) - labels:
            expected = f"expected a list of labels of its prompts: {', '.join(sorted(labels)) or 'they have none'}"
            raise UserError(f"{file}: the subject {name!r}: found seen: {seen!r}; {expected}")
        if all(set(seen) & set(prompt.labels.values()) for prompt in prompts[kind]):
            raise UserError(f"{file}: the subject {name!r}: seen leaves no prompt; expected fewer labels in it")
    return {str(name): dict(subject) for name, subject in found.items()}


def _labeled_prompts(file: Path, what: str, found: Any) -> tuple[Prompt, ...]:
    """Read prompts, some of them with labels: {prompt: "{subject} in the snow", scene: snow}."""
    _check_list(file, what, found)
    entries = [each if isinstance(each, dict) else {"prompt": each} for each in found]
    for entry in entries:
        if not entry.keys() <= {"prompt", *LABEL_KINDS} or not all(isinstance(each, str) for each in entry.values()):
            expected = f"expected a text, or a prompt with {', '.join(LABEL_KINDS)}"
            raise UserError(f"{file}: {what}: found {entry}; {expected}")
        if "prompt" not in entry:
            raise UserError(f"{file}: {what}: found {entry}, without a prompt; expected one beside the labels")
    texts = _prompts(file, what, [entry["prompt"] for entry in entries], True)
    labels = {entry["prompt"]: {kind: entry[kind] for kind in LABEL_KINDS if kind in entry} for entry in entries}
    return tuple(Prompt(text, labels[text]) for text in texts)


def _prompts(file: Path, what: str, found: Any, with_subject: bool) -> tuple[str, ...]:
    _check_list(file, what, found)
    for prompt in found:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{file}: {what}: expected a list of prompts; found {prompt!r} in it")
        if (prompt.count(SUBJECT) > 0) != with_subject or set(re.findall(r"\{.*?\}", prompt)) - {SUBJECT}:
            with_it = f"expected it with {SUBJECT}, and no other placeholder"
            expected = with_it if with_subject else f"expected it without {SUBJECT}, or any other placeholder"
            raise UserError(f"{file}: {what}: {prompt!r}: {expected}")
    return tuple(dict.fromkeys(found))


def _check_list(file: Path, what: str, found: Any) -> None:
    if not isinstance(found, list) or not found:
        is_missing = "none" if found is None or found == [] else repr(found)
        raise UserError(f"{file}: {what}: expected a list of prompts; found {is_missing}")


def _references(name: str, data_dir: Path, alone: bool) -> tuple[Path, ...]:
    folder = data_dir / name
    if not folder.is_dir() and alone:
        folder = data_dir
    if not folder.is_dir():
        raise UserError(f"the concept {name!r}: found no folder {folder} of images of its subject")
    unseen = folder / UNSEEN_FOLDER
    files = list_images(unseen if unseen.is_dir() else folder)
    if not files:
        raise UserError(f"{folder}: no image in it; expected images of the subject {name!r}")
    return tuple(files)
