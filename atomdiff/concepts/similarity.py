"""What a library answers about how alike its concepts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class SimilarConcept(NamedTuple):
    """A concept and how similar another one is."""

    name: str
    """Its name in the library."""
    similarity: float
    """Cosine of the changes of the two concepts' atoms, from -1 to 1."""


class Duplicates(NamedTuple):
    """Concepts of a library that are nearly or wholly the same."""

    names: tuple[str, ...]
    """Their names in the library, sorted."""
    similarity: float
    """The lowest cosine of those of their pairs that reach the threshold."""
    are_equal: bool
    """Whether all their tensors are equal, those of trigger words included."""


def group_duplicates(links: Iterable[tuple[str, str, float]], contents: Mapping[str, str]) -> list[Duplicates]:
    """Return the groups that pairs of concepts connect, equal ones first, then the most alike.

    Args:
        links: pairs with their cosine.
        contents: concept -> hash of its tensors.
    """
    groups: dict[str, tuple[set[str], list[float]]] = {}  # by each of the names
    for one, other, cosine in links:
        group, joining = (groups.setdefault(name, ({name}, [])) for name in (one, other))
        group[1].append(cosine)
        if group is not joining:
            group[0].update(joining[0])
            group[1].extend(joining[1])
            groups.update(dict.fromkeys(joining[0], group))
    found = [
        Duplicates(tuple(sorted(names)), min(cosines), len({contents[name] for name in names}) == 1)
        for names, cosines in {id(group): group for group in groups.values()}.values()
    ]
    return sorted(found, key=lambda group: (not group.are_equal, -group.similarity, group.names))
