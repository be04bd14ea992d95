"""The images of a sampling job, sorted and packed into batches, so that weights are switched rarely."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from atomdiff.sampling.output_files import SampleFile
from atomdiff.sampling.prompt_requests import PromptRequest


class Sample(NamedTuple):
    """An image to generate."""

    file: SampleFile
    """Where it is saved."""
    request: PromptRequest
    """Its prompt and concepts."""


def sort_by_concepts(samples: Sequence[Sample]) -> list[Sample]:
    """Bring samples with the same concepts together, those with the same weights side by side; a stable sort."""
    first: dict[str, int] = {}
    for position, sample in enumerate(samples):
        first.setdefault(sample.request.concepts_json, position)

    def key(sample: Sample) -> tuple[list[str], int]:
        names = sorted(concept.name for concept, _ in sample.request.concepts)
        return names, first[sample.request.concepts_json]

    return sorted(samples, key=key)


def shard(samples: Sequence[Sample], process_index: int, num_processes: int) -> Sequence[Sample]:
    """Return one process's part of sorted samples: a contiguous one, so that its samples share concepts."""
    size, remainder = divmod(len(samples), num_processes)
    start = process_index * size + min(process_index, remainder)
    return samples[start : start + size + (process_index < remainder)]


def make_batches(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Cut sorted samples into batches: full ones of equal concepts and weights first, then mixed ones of the rest.

    Samples with other adapters than atoms, which cannot be mixed, get batches of their own.
    """
    batches: list[list[Sample]] = []
    rest: list[Sample] = []
    for _, group in groupby(samples, key=lambda sample: sample.request.concepts_json):
        equal = list(group)
        can_mix = all(concept.is_atoms for concept, _ in equal[0].request.concepts)
        full = len(equal) // batch_size * batch_size if can_mix else len(equal)
        batches += [equal[start : min(start + batch_size, full)] for start in range(0, full, batch_size)]
        rest += equal[full:]
        while len(rest) >= batch_size:
            batches.append(rest[:batch_size])
            rest = rest[batch_size:]
    return [*batches, rest] if rest else batches
