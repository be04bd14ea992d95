"""What compact files keep of the metadata: what readers look at. The folder of the run has all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEDULE_SETTINGS = ("prediction_type", "rescale_betas_zero_snr", "flow_shift")
"""Of a run's config: what the denoiser was trained to predict."""
_REPEATED = ("implementation", "sai_model_spec", "trigger_phrase")  # the same in all files, or there already


def compact_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Keep all that is known of a run, but of its config only what it was trained to predict, where it says so."""
    config = training.get("config")
    if not isinstance(config, dict):
        return dict(training)
    kept = {key: config[key] for key in SCHEDULE_SETTINGS if config.get(key) is not None}
    rest = {key: value for key, value in training.items() if key != "config"}
    return rest | ({"config": kept} if kept else {})


def compact_modelspec(modelspec: Mapping[str, str]) -> dict[str, str]:
    """Keep the fields that say something about this concept."""
    return {key: value for key, value in modelspec.items() if key not in _REPEATED}
