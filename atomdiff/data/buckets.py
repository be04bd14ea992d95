"""Aspect buckets: the few sizes that images of different shapes are cut to."""

import math
import re
from collections.abc import Sequence

from atomdiff.utils.errors import UserError

_MAX_SIDE = 8192  # pixels of a side

Size = tuple[int, int]
"""Height and width in pixels."""


def parse_buckets(text: str) -> tuple[Size, ...] | None:
    """Read sizes written as "height,width;height,width", as in diffusers' scripts; None for "auto".

    Raises:
        UserError: the text is neither.
    """
    if text.strip() == "auto":
        return None
    pairs = [re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", pair) for pair in text.split(";")]
    sizes = tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)
    if len(sizes) < len(pairs) or not all(0 < side <= _MAX_SIDE for size in sizes for side in size):
        expected = f'"auto", or "height,width;..." of at most {_MAX_SIDE} pixels, say 512,768;768,512'
        raise UserError(f"aspect_ratio_buckets={text!r}: expected {expected}")
    return tuple(dict.fromkeys(sizes))


def bucket_sizes(text: str | None, side: int, multiple: int) -> tuple[Size, ...]:
    """Return the sizes that images may be cut to: only the square of `side` pixels without `text`.

    Args:
        text: what `parse_buckets` reads.
        side: the resolution of the run.
        multiple: both sides are multiples of it, as the base needs.

    Raises:
        UserError: a side is not such a multiple.
    """
    if text is None:
        return ((side, side),)
    sizes = parse_buckets(text) or automatic_buckets(side, multiple)
    if wrong := [size for size in sizes if size[0] % multiple or size[1] % multiple]:
        found = ";".join(f"{height},{width}" for height, width in wrong)
        raise UserError(f"aspect_ratio_buckets={text!r}: this base needs multiples of {multiple}; found {found}")
    return sizes


def automatic_buckets(side: int, multiple: int) -> tuple[Size, ...]:
    """Return all sizes with sides between `side` / 2 and 2 `side`, one of them the longest for the other in `side`^2.

    These are kohya's buckets, with `multiple` for its bucket_reso_steps: every side is a multiple of it.
    """
    least, most = math.ceil(side / 2 / multiple) * multiple, 2 * side
    sides = range(least, most + 1, multiple)
    halves = [(long, min(most, side * side // long // multiple * multiple)) for long in sides]
    found = {size for one, other in halves if other >= least for size in ((one, other), (other, one))}
    return tuple(sorted(found))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose aspect ratio is nearest to that of `size`, as a factor; of several the largest."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - ratio), -bucket[0] * bucket[1]))
