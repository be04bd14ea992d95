"""Hashes of the parts of a base that its images depend on."""

import json
from typing import Any

from torch import nn

from atomdiff.utils.hashing import hash_values, quick_hash

_SETTINGS = ("scaling_factor", "shift_factor")  # of a VAE: between its latents and those of the denoiser


def base_keys(pipe: Any) -> dict[str, str]:
    """Return a key (16 hexadecimal digits) of each part of a pipeline that its images depend on.

    Of networks all weights count, in the precision that they have in memory; of the scheduler all settings that are
    not off, so that what later versions of diffusers add to it, off at first, changes nothing.
    """
    keys = {}
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            config: Any = part.config
            settings = {setting: getattr(config, setting, None) for setting in _SETTINGS}
            keys[name] = hash_values(quick_hash(part.parameters()), json.dumps(settings))[:16]
    on = {key: value for key, value in pipe.scheduler.config.items() if value and not key.startswith("_")}
    known = json.dumps(on, sort_keys=True, default=str)
    keys["scheduler"] = hash_values(type(pipe.scheduler).__name__, known)[:16]
    return keys
