"""What a run learns from, known by its content: wherever the files lie, a run goes on with what it began with only."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

Row = Sequence[str]
"""File name, and keys of the pixels, of the prompts and of the mask; the last may be empty."""

_KINDS = {"photos": "photos", "class_images": "class images"}


def image_key(image: Image.Image) -> str:
    """Return a SHA-256 of an image's mode, size and pixels (16 hexadecimal digits)."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def text_key(texts: Sequence[str]) -> str:
    """Return a SHA-256 of some texts (16 hexadecimal digits)."""
    return hashlib.sha256(repr(tuple(texts)).encode()).hexdigest()[:16]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what is other than it was; names of files do not count, only their order and what they hold.

    Args:
        then: `base`, keys by part; `photos` and `class_images`, a `Row` each.
        now: The same.
    """
    said = []
    parts = [name for name in {**then["base"], **now["base"]} if then["base"].get(name) != now["base"].get(name)]
    if parts:
        said.append(f"another base ({', '.join(parts)})")
    for field, kind in _KINDS.items():
        old, new = [list(row) for row in then[field]], [list(row) for row in now[field]]
        if [row[1:] for row in old] != [row[1:] for row in new]:
            said.append(f"other {kind} ({_rows(old, new)})")
    return said


def _rows(old: Sequence[Row], new: Sequence[Row]) -> str:
    """Say which images, captions or masks differ."""
    before, after = ({name: (image, text, mask) for name, image, text, mask in rows} for rows in (old, new))
    known, seen = ({row[1] for row in rows} for rows in (old, new))
    lost, come = [row[0] for row in old if row[1] not in seen], [row[0] for row in new if row[1] not in known]
    found = {
        "gone": [name for name in lost if name not in come],
        "new": [name for name in come if name not in lost],
        "changed": [name for name in lost if name in come],
    }
    same = [name for name in before if name in after and before[name][0] == after[name][0]]
    found["caption changed"] = [name for name in same if before[name][1] != after[name][1]]
    found["mask changed"] = [name for name in same if before[name][2] != after[name][2]]
    told = [f"{what}: {_few(names)}" for what, names in found.items() if names]
    return "; ".join(told) or f"the same in another order or number: {len(old)} then, {len(new)} now"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
