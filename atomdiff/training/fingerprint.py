"""Fingerprints of what a run learns from: it resumes with the same images, captions, masks and base only.

They are taken of the content, wherever the files lie.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from atomdiff.utils.hashing import hash_values

ImageFingerprint = Sequence[str]
"""File name, and keys of the pixels, of the prompts and of the mask; the last may be empty."""

_KINDS = ("instance_images", "class_images")


def image_key(image: Image.Image) -> str:
    """Return a SHA-256 of an image's mode, size and pixels (16 hexadecimal digits)."""
    return hash_values(image.mode, *image.size, image.tobytes())[:16]


def text_key(texts: Sequence[str]) -> str:
    """Return a SHA-256 of some texts (16 hexadecimal digits)."""
    return hash_values(*texts)[:16]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what is other than it was; names of files do not count, only their order and what they hold.

    Args:
        then: `base`, keys by part; `instance_images` and `class_images`, an `ImageFingerprint` each.
        now: The same.
    """
    found = []
    parts = [name for name in {**then["base"], **now["base"]} if then["base"].get(name) != now["base"].get(name)]
    if parts:
        found.append(f"another base ({', '.join(parts)})")
    for kind in _KINDS:
        old, new = [list(image) for image in then[kind]], [list(image) for image in now[kind]]
        if [image[1:] for image in old] != [image[1:] for image in new]:
            found.append(f"other {kind.replace('_', ' ')} ({_image_differences(old, new)})")
    return found


def _image_differences(old: Sequence[ImageFingerprint], new: Sequence[ImageFingerprint]) -> str:
    """Say which images, captions or masks differ."""
    before, after = ({name: (image, text, mask) for name, image, text, mask in images} for images in (old, new))
    known, seen = ({image[1] for image in images} for images in (old, new))
    lost = [image[0] for image in old if image[1] not in seen]
    come = [image[0] for image in new if image[1] not in known]
    found = {
        "gone": [name for name in lost if name not in come],
        "new": [name for name in come if name not in lost],
        "changed": [name for name in lost if name in come],
    }
    same = [name for name in before if name in after and before[name][0] == after[name][0]]
    found["caption changed"] = [name for name in same if before[name][1] != after[name][1]]
    found["mask changed"] = [name for name in same if before[name][2] != after[name][2]]
    parts = [f"{what}: {_few(names)}" for what, names in found.items() if names]
    return "; ".join(parts) or f"the same in another order or number: {len(old)} then, {len(new)} now"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
