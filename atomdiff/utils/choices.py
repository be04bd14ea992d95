"""Values that users choose among in several subpackages, by the names of diffusers and accelerate."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Precision = Literal["no", "fp16", "bf16"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
TimestepSampling = Literal["uniform", "logit_normal", "cubic"]
Preservation = Literal["none", "class", "blank"]

FLOW_SHIFTS = (0.01, 1000.0)  # beyond, noise levels fall together
