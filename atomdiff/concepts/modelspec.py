"""The modelspec fields that other programs read to know what a concept file is for."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from typing import Any

from atomdiff.utils.errors import UserError


def model_spec(pipe: Any, title: str, trigger_phrase: str = "") -> dict[str, str]:
    """Fields of the Stability model metadata standard 1.0.1 for a concept made on this pipeline, without their prefix.

    Only `date` changes between two calls, and not even that where SOURCE_DATE_EPOCH gives it.

    Raises:
        UserError: SOURCE_DATE_EPOCH is no whole number.
    """
    predicts = prediction_type(pipe.components.get("scheduler"))
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_architecture(pipe)}/atoms",
        "implementation": "diffusers",
        "title": title,
        "date": _date(),
        "trigger_phrase": trigger_phrase,
        "prediction_type": {"v_prediction": "v"}.get(predicts, predicts),
        "resolution": _resolution(pipe),
    }
    return {key: value for key, value in fields.items() if value}


def prediction_type(scheduler: Any) -> str:
    """What a diffusers scheduler says is predicted: epsilon, v_prediction, sample or flow; empty if it does not say."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    found = getattr(getattr(scheduler, "config", None), "prediction_type", "")
    return "flow" if found == "flow_prediction" else str(found or "")


def _date() -> str:
    """Now, or what SOURCE_DATE_EPOCH says (reproducible-builds.org), in UTC to the second."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given and not given.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH={given!r}: expected whole seconds since 1970, such as 1700000000")
    seconds = int(given) if given else time.time()
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _architecture(pipe: Any) -> str:
    if "XL" in type(pipe).__name__:
        return "stable-diffusion-xl-v1-base"
    unet = pipe.components.get("unet")
    width = getattr(getattr(unet, "config", None), "cross_attention_dim", 0)
    predicts_v = prediction_type(pipe.components.get("scheduler")) == "v_prediction"
    second = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
    known = {768: "stable-diffusion-v1", 1024: second}
    return known.get(width, "stable-diffusion") if type(pipe).__name__.startswith("StableDiffusion") else "other"


def _resolution(pipe: Any) -> str:
    denoiser = pipe.components.get("unet", pipe.components.get("transformer"))
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(size, int):
        return ""
    pixels = size * int(getattr(pipe, "vae_scale_factor", 8))
    return f"{pixels}x{pixels}"
