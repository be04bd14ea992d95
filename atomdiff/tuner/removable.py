"""Find PEFT configs whose adapters change the base itself, so that deleting the adapter does not give it back."""

from __future__ import annotations

import re
from typing import Any

_REWRITING = re.compile("pissa.*|olora|corda|loftq|lora_ga")


def why_not_removable(config: Any) -> str | None:
    """What an adapter of these settings changes for good, and what to do instead; None: it comes off again."""
    bias = getattr(config, "bias", "none")
    if bias not in ("none", None):
        return (
            f"bias={bias!r} trains biases of the base itself, which cannot be removed again and have no weight: "
            "use bias='none'"
        )
    for field, what in (
        ("modules_to_save", "replaces whole modules"),
        ("trainable_token_indices", "replaces rows of embeddings; train a trigger word instead"),
        ("target_parameters", "changes parameters that are no layers' weights"),
        ("layer_replication", "repeats layers of the base"),
    ):
        if value := getattr(config, field, None):
            return f"{field}={value!r:.100} {what}: leave it out"
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and _REWRITING.fullmatch(start):
        return (
            f"init_lora_weights={start!r} rewrites the base weights: leave it out, or convert a trained adapter with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return None
