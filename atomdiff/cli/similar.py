"""`atomdiff similar`: the concepts of a library that are most like one, or duplicates in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, PositiveInt, Range
from atomdiff.utils.paths import PathText

if TYPE_CHECKING:
    from atomdiff.concepts.library import ConceptLibrary


@dataclass(frozen=True, kw_only=True)
class SimilarConfig(ConfigGroup):
    """Show the concepts of a library that are most like a concept, or without one the duplicates in the library."""

    file: PathText | None = None
    """The concept file, or the name of a concept of the library. Default: look for duplicates."""
    library: PathText
    """Folder of concept files."""
    k: PositiveInt = 10
    """How many concepts to show."""
    threshold: Annotated[float, Range(-1, 1)] = 0.999
    """Least cosine of duplicates."""


def describe_similar(config: SimilarConfig) -> str:
    """Return what is similar, as text.

    Raises:
        UserError: there is no such library or concept, or nothing to compare with.
    """
    from atomdiff.concepts.concept_file import read_concept_file
    from atomdiff.concepts.library import ConceptLibrary

    if not Path(config.library).is_dir():
        raise UserError(f"library={config.library!r}: expected a folder of concept files")
    library = ConceptLibrary(config.library)
    if config.file is None:
        return _describe_duplicates(library, config.threshold)
    path = Path(os.path.abspath(config.file))
    name = next((each for each in library if library.info(each).path == path), None)
    if name is None and config.file in library and not path.is_file():
        name = config.file
    found = library.similar(name or read_concept_file(path), max(len(library), 1))
    lines = [f"{similarity:7.4f}  {name}" for name, similarity in found[: config.k]]
    others = len(library) - len(found) - (name is not None)
    if others:
        lines.append(f"not compared: {others} of another base, or with other kinds of atoms or layers")
    return "\n".join(lines)


def _describe_duplicates(library: ConceptLibrary, threshold: float) -> str:
    lines = [
        f"{'equal' if group.are_equal else f'{group.similarity:.4f}'}: {', '.join(group.names)}"
        for group in library.duplicates(threshold)
    ]
    return "\n".join(lines) or f"no duplicates among {len(library)} concepts (cosines of {threshold} and more)"
