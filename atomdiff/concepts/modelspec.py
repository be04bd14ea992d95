"""The modelspec fields that other programs read to know what a concept file is for."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from typing import Any

from atomdiff.bases.find import find_base
from atomdiff.bases.noise_schedule import prediction_type
from atomdiff.utils.errors import UserError


def model_spec(pipe: Any, title: str, trigger_phrase: str = "") -> dict[str, str]:
    """Return the fields of the Stability model metadata standard 1.0.1 for a concept of a pipeline, without prefix.

    Only `date` changes between two calls, and not even that where SOURCE_DATE_EPOCH gives it.

    Raises:
        UserError: SOURCE_DATE_EPOCH is no whole number.
    """
    base = find_base(pipe.components)
    predicted, size = prediction_type(pipe.components.get("scheduler")), base.native_size(pipe)
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{base.architecture(pipe)}/atoms",
        "implementation": "diffusers",
        "title": title,
        "date": _date(),
        "trigger_phrase": trigger_phrase,
        "prediction_type": {"v_prediction": "v"}.get(predicted, predicted),
        "resolution": f"{size[1]}x{size[0]}" if size else "",
    }
    return {key: value for key, value in fields.items() if value}


def _date() -> str:
    """Return now, or what SOURCE_DATE_EPOCH says (reproducible-builds.org), in UTC to the second."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given and not given.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH={given!r}: expected whole seconds since 1970, such as 1700000000")
    seconds = int(given) if given else time.time()
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
