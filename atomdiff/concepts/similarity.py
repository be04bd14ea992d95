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
    """The lowest cosine of the pairs that connect them."""
    are_equal: bool
    """Whether all their tensors are equal, those of trigger words included."""


def group_duplicates(links: Iterable[tuple[str, str, float]], contents: Mapping[str, str]) -> list[Duplicates]:
    """Return the groups that pairs of concepts connect, equal ones first, then the most alike.

    Args:
        links: pairs with their cosine.
        contents: concept -> hash of its tensors.
    """
    groups: dict[str, tuple[set[str], float]] = {}  # by each of the names
    for one, other, cosine in links:
        (names, least), (others, lower) = (groups.get(name, ({name}, 1.0)) for name in (one, other))
        if names is others:
            continue
        joined = names | others, min(least, lower, cosine)
        groups.update(dict.fromkeys(joined[0], joined))
    distinct = {id(group): group for group in groups.values()}
    found = [
        Duplicates(tuple(sorted(names)), least, len({contents[name] for name in names}) == 1)
        for names, least in distinct.values()
    ]
    return sorted(found, key=lambda group: (not group.are_equal, -group.similarity, group.names))
