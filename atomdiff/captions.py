"""The orders of a caption's tags."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

_MOST_ORDERS = 16  # a caption's orders are few enough for their text states to be computed once


def tag_orders(caption: str, keep_tokens: int, seed: int) -> tuple[str, ...]:
    """Return a caption with its comma-separated tags in several orders, each once: all if up to three tags can move.

    Args:
        caption: Tags such as "sks mug, red, on a table"; one without commas stays alone.
        keep_tokens: How many of the first tags stay where they are.
        seed: Draws up to 16 orders where there are more.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, loose = tags[:keep_tokens], tags[keep_tokens:]
    if len(loose) < 2:
        return (caption,)
    orders: Iterable[Sequence[int]] = itertools.permutations(range(len(loose)))
    if math.factorial(len(loose)) > _MOST_ORDERS:
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(len(loose), generator=generator).tolist() for _ in range(_MOST_ORDERS))
    return tuple(dict.fromkeys(", ".join([*kept, *(loose[place] for place in order)]) for order in orders))
