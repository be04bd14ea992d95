"""Prompts sorted and packed into batches, so that weights are switched rarely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from atomdiff.sampling.prompt_requests import PromptRequest

Item = TypeVar("Item")


def sort_by_concepts(items: Sequence[Item], request_of: Callable[[Item], PromptRequest]) -> list[Item]:
    """Bring items with the same concepts together, those with the same weights side by side; a stable sort."""
    first: dict[str, int] = {}
    for position, item in enumerate(items):
        first.setdefault(request_of(item).concepts_json, position)

    def key(item: Item) -> Any:
        request = request_of(item)
        return sorted(concept.name for concept, _ in request.concepts), first[request.concepts_json]

    return sorted(items, key=key)


def shard(items: Sequence[Item], process_index: int, num_processes: int) -> Sequence[Item]:
    """Return one process's part of sorted items: a contiguous one, so that its items share concepts."""
    size, remainder = divmod(len(items), num_processes)
    start = process_index * size + min(process_index, remainder)
    return items[start : start + size + (process_index < remainder)]


def make_batches(
    items: Sequence[Item], request_of: Callable[[Item], PromptRequest], batch_size: int
) -> list[list[Item]]:
    """Cut sorted items into batches: full ones of equal concepts and weights first, then mixed ones of the rest.

    Items with other adapters than atoms, which cannot be mixed, get batches of their own.
    """
    batches: list[list[Item]] = []
    rest: list[Item] = []
    for _, group in groupby(items, key=lambda item: request_of(item).concepts_json):
        equal = list(group)
        can_mix = all(concept.read is not None for concept, _ in request_of(equal[0]).concepts)
        full = len(equal) // batch_size * batch_size if can_mix else len(equal)
        batches += [equal[start : min(start + batch_size, full)] for start in range(0, full, batch_size)]
        rest += equal[full:]
        while len(rest) >= batch_size:
            batches.append(rest[:batch_size])
            rest = rest[batch_size:]
    return [*batches, rest] if rest else batches
