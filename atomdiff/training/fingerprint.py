"""Fingerprints of what a run learns from: it resumes with the same images, captions, masks and base only.

They are taken of the content, wherever the files lie.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import nn

from atomdiff.utils.hashing import hash_values, quick_hash
from atomdiff.utils.untrusted import list_some

ImageFingerprint = Sequence[str]
"""File name, and keys of the pixels, of the prompts and of the mask; the last may be empty."""

_KINDS = ("instance_images", "class_images", "held_out_images")
_VAE_SETTINGS = ("scaling_factor", "shift_factor")  # between its latents and those of the denoiser


def base_keys(pipe: Any) -> dict[str, str]:
    """Return a key (16 hexadecimal digits) of each part of a pipeline that its images depend on.

    Of networks all weights count, in the precision that they have in memory; of the scheduler all settings that are
    not off, so that what later versions of diffusers add to it, off at first, changes nothing.
    """
    keys = {}
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            config: Any = part.config
            settings = {setting: getattr(config, setting, None) for setting in _VAE_SETTINGS}
            keys[name] = hash_values(quick_hash(part.parameters()), json.dumps(settings))[:16]
    on = {key: value for key, value in pipe.scheduler.config.items() if value and not key.startswith("_")}
    settings_on = json.dumps(on, sort_keys=True, default=str)
    keys["scheduler"] = hash_values(type(pipe.scheduler).__name__, settings_on)[:16]
    return keys


def image_key(image: Image.Image) -> str:
    """Return a SHA-256 of an image's mode, size and pixels (16 hexadecimal digits)."""
    return hash_values(image.mode, *image.size, image.tobytes())[:16]


def text_key(texts: Sequence[str]) -> str:
    """Return a SHA-256 of some texts (16 hexadecimal digits)."""
    return hash_values(*texts)[:16]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in words what has changed; names of files do not count, only their order and content.

    Args:
        then: `base`, keys by part; `instance_images` and so on, an `ImageFingerprint` each. No held-out images differ
            from none, as training depends on none of them.
        now: The same.
    """
    changes = []
    parts = [name for name in {**then["base"], **now["base"]} if then["base"].get(name) != now["base"].get(name)]
    if parts:
        changes.append(f"another base ({', '.join(parts)})")
    for kind in _KINDS:
        old, new = ([list(image) for image in each.get(kind, ())] for each in (then, now))
        if kind == "held_out_images" and not (old and new):
            continue
        if [image[1:] for image in old] != [image[1:] for image in new]:
            changes.append(f"other {kind.replace('_', ' ')} ({_image_differences(old, new)})")
    return changes


def _image_differences(old: Sequence[ImageFingerprint], new: Sequence[ImageFingerprint]) -> str:
    """Say which images, captions or masks differ."""
    before, after = ({name: (image, text, mask) for name, image, text, mask in images} for images in (old, new))
    old_keys, new_keys = ({image[1] for image in images} for images in (old, new))
    removed = [image[0] for image in old if image[1] not in new_keys]
    added = [image[0] for image in new if image[1] not in old_keys]
    same = [name for name in before if name in after and before[name][0] == after[name][0]]
    changes = {
        "gone": [name for name in removed if name not in added],
        "new": [name for name in added if name not in removed],
        "changed": [name for name in removed if name in added],
        "caption changed": [name for name in same if before[name][1] != after[name][1]],
        "mask changed": [name for name in same if before[name][2] != after[name][2]],
    }
    parts = [f"{change}: {list_some(names)}" for change, names in changes.items() if names]
    return "; ".join(parts) or f"the same in another order or number: {len(old)} then, {len(new)} now"
