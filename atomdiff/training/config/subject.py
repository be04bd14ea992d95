"""Subjects: what a folder of photos shows, its trigger word and its prompts; one by options, several by a list."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from atomdiff.utils.articles import fit_article
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, Range
from atomdiff.utils.paths import InputPath, PathText
from atomdiff.utils.text_files import read_yaml

MAX_REPEATS = 10_000


@dataclass(frozen=True, kw_only=True)
class SubjectConfig(ConfigGroup):
    """Images, trigger word and prompts of the subject.

    Prompts may contain `{trigger_word}` (or `{trigger}`) and `{class_name}`.
    """

    instance_data_dir: InputPath | None = None
    """Folder of instance images, which show the subject; required without concepts_list. A .txt file beside an image is
    its caption and replaces instance_prompt."""
    repeats: Annotated[int, Range(1, MAX_REPEATS)] = 1
    """How often each instance image is used in an epoch. Balances subjects with few and many images in one_file."""
    validation_data_dir: InputPath | None = None
    """Folder of more images of the subject that are not trained on, for the validation loss; with captions and masks as
    in instance_data_dir. Default: none, see validation_split."""
    class_name: str | None = None
    """Class of the subject, a word that the base model knows, such as mug."""
    trigger_word: str = "sks"
    """Word that stands for the subject in prompts."""
    initializer_token: str | None = None
    """Text whose mean token embedding initializes the trigger word. Default: class_name."""
    instance_prompt: str = "a photo of {trigger_word} {class_name}"
    """Prompt of instance images without a caption. {trigger_word} and {class_name} are filled in, in every prompt."""
    class_prompt: str = "a photo of a {class_name}"
    """Prompt of class images."""
    class_data_dir: PathText | None = None
    """Folder of class images. Missing ones are generated; images that were generated with another base model or other
    settings are refused. May contain {class_name}. Default: class_images in output_dir, with a folder for each subject
    of a concepts_list."""

    def check(self) -> None:
        """Check the trigger word."""
        if not self.trigger_word or len(self.trigger_word.split()) != 1:
            raise UserError(f"trigger_word={self.trigger_word!r}: expected one word without spaces")


@dataclass(frozen=True, kw_only=True)
class Subject(SubjectConfig):
    """One subject of a run."""

    instance_data_dir: InputPath

    def fill(self, prompt: str) -> str:
        """Fill the trigger word and the class name into a prompt."""
        for name in ("{trigger_word}", "{trigger}"):
            prompt = prompt.replace(name, self.trigger_word)
        class_name = self.class_name or ""
        return fit_article(prompt, class_name).replace("{class_name}", class_name)

    @property
    def name(self) -> str:
        """Name of the folder of instance images."""
        return Path(self.instance_data_dir).resolve().name

    @property
    def phrase(self) -> str:
        """What to write in prompts: trigger word and class."""
        return self.fill("{trigger_word} {class_name}").strip()


def read_subjects(file: Path) -> list[dict[str, Any]]:
    """Read the entries of a `concepts_list`.

    Raises:
        UserError: The file cannot be read, or an entry is not what it should be.
    """
    entries = read_yaml(file)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: expected a list of mappings, one a subject, each with an instance_data_dir")
    known = {field.name for field in fields(Subject)}
    for entry in entries:
        if unknown := sorted(map(str, entry.keys() - known)):
            raise UserError(f"{file}: unknown {', '.join(unknown)}; a subject has {', '.join(sorted(known))}")
        if "instance_data_dir" not in entry:
            raise UserError(f"{file}: found a subject without instance_data_dir: {entry}")
        for name, value in entry.items():
            entry[name] = _read_value(file, name, value)
    return entries


def _read_value(file: Path, name: str, value: Any) -> Any:
    if name == "repeats":
        if type(value) is not int:
            raise UserError(f"{file}: repeats={value!r}: expected a whole number from 1 to {MAX_REPEATS}")
    elif name in _OPTIONAL and str(value).lower() in ("none", "null"):
        return None
    elif not isinstance(value, str):
        raise UserError(f"{file}: {name}={value!r}: expected a text")
    return value


_OPTIONAL = ("class_name", "initializer_token", "class_data_dir", "validation_data_dir")
