"""Which images each training step sees, as pure functions of the seed and the step."""

from collections.abc import Sequence

import torch

from atomdiff.utils.seeds import derive_seed


def sample_order(count: int, position: int, batch_size: int, seed: int) -> list[int]:
    """Return which of `count` samples stand at `position`, `position + 1`, ... of an endless shuffled reading.

    Every `count` positions hold each sample once. A pure function of its arguments, so that nothing has to be saved to
    go on where a run stopped.
    """
    order: list[int] = []
    for epoch in range(position // count, (position + batch_size - 1) // count + 1):
        shuffle = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        order += torch.randperm(count, generator=shuffle).tolist()
    first = position % count
    return order[first : first + batch_size]


def bucket_for_pass(number: int, counts: Sequence[int], seed: int) -> tuple[int, int]:
    """Return which bucket forward pass `number` belongs to, and how many earlier passes did.

    Every round of `sum(counts)` passes has `counts[b]` of bucket `b`, in an order of its own: if those are the samples
    of the buckets, every sample comes equally often in a round. A pure function, as `sample_order` is.
    """
    length = sum(counts)
    earlier_rounds, position = divmod(number, length)
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    order = [buckets[i] for i in sample_order(length, earlier_rounds * length, length, seed)]
    bucket = order[position]
    return bucket, earlier_rounds * counts[bucket] + order[:position].count(bucket)
