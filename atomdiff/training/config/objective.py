"""The training objective: prediction type, noise schedule, timesteps and loss weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atomdiff.utils.choices import FLOW_SHIFTS, PredictionType, TimestepSampling
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(ConfigGroup):
    """Training objective: noise, timesteps and loss."""

    snr_gamma: PositiveFloat | None = None
    """Gamma of min-SNR loss weighting; 5 is recommended. Default: no weighting."""
    noise_offset: NonNegativeFloat = 0.0
    """Scale of the noise offset, for very dark or bright images; 0.1 is usual."""
    prediction_type: PredictionType | None = None
    """Prediction type of the base model. Default: that of its scheduler config."""
    rescale_betas_zero_snr: bool | None = None
    """Rescale the noise schedule to zero terminal SNR (Lin et al., arXiv 2305.08891), for base models trained that way;
    not with epsilon. Default: that of the base model's scheduler config."""
    flow_shift: Annotated[float, Range(FLOW_SHIFTS[0], below=FLOW_SHIFTS[1])] | None = None
    """Timestep shift of prediction type flow: 1 spaces noise levels evenly, 3 (as in SD3) puts more of them near pure
    noise. Default: that of the scheduler config, else 1."""
    timestep_sampling: TimestepSampling = "uniform"
    """Distribution of training timesteps: uniform, logit_normal (more from the middle) or cubic (more from the noisy
    end)."""
    logit_mean: Annotated[float, Range(-100, below=100)] = 0.0
    """Mean of logit_normal; above 0, noisier timesteps are sampled more often."""
    logit_std: NonNegativeFloat = 1.0
    """Standard deviation of logit_normal."""
    min_timestep: NonNegativeInt = 0
    """First training timestep; 0 has the least noise."""
    max_timestep: PositiveInt | None = None
    """End of the training timesteps, exclusive. Default: all, which are 1000 in Stable Diffusion."""

    def check(self) -> None:
        """Check that what is set is used, and that the range of timesteps is not empty."""
        if self.timestep_sampling != "logit_normal" and (self.logit_mean, self.logit_std) != (0, 1):
            found = f"logit_mean={self.logit_mean}, logit_std={self.logit_std}"
            raise UserError(f"{found}: expected timestep_sampling='logit_normal' with them")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise UserError(f"max_timestep={self.max_timestep}: expected more than min_timestep={self.min_timestep}")
        if self.rescale_betas_zero_snr and self.prediction_type in ("epsilon", "flow"):
            expected = "expected prediction_type v_prediction or sample, or none"
            raise UserError(f"rescale_betas_zero_snr=True, prediction_type={self.prediction_type!r}: {expected}")
        if self.flow_shift is not None and self.prediction_type not in (None, "flow"):
            expected = f"expected prediction_type 'flow', found {self.prediction_type!r}"
            raise UserError(f"flow_shift={self.flow_shift}: {expected}")
