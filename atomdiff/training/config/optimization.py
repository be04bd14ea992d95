"""How a run moves the parameters of a concept: a learning rate for each group, accumulated batches, averages."""

from __future__ import annotations

from dataclasses import dataclass

from atomdiff.training.config.optimizer import OptimizerConfig, ParameterGroup
from atomdiff.training.config.prompt import TextConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import PositiveInt, Share


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(TextConfig, OptimizerConfig):
    """Accumulated batches and weight averages."""

    scale_lr: bool = False
    """Scale all learning rates by train_batch_size x gradient_accumulation_steps x number of processes."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are accumulated for one optimizer step."""
    use_ema: bool = False
    """Use an exponential moving average (EMA) of the trained parameters for validation images and the saved file."""
    ema_decay: Share = 0.999
    """Decay rate of the EMA, reached gradually: (1 + step) / (10 + step) until then."""

    @property
    def learning_rates(self) -> dict[ParameterGroup, float]:
        """The learning rate of each group of parameters that the run may train."""
        adapter, token = super().learning_rates["adapter"], self.optimizer_spec.token_learning_rate
        text_encoder = adapter if self.text_encoder_lr is None else self.text_encoder_lr
        rates: dict[ParameterGroup, float] = {"adapter": adapter, "text_encoder": text_encoder}
        if self.train_token:
            default = adapter if token is None else token
            rates["token"] = default if self.token_learning_rate is None else self.token_learning_rate
        return rates

    @property
    def token_steps(self) -> int:
        """The number of steps in which token embeddings are trained."""
        return round(self.train_text_encoder_ti_frac * self.max_train_steps)

    def instance_images_per_step(self, processes: int) -> int:
        """Return how many instance images a step sees, on all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def learning_rate_scale(self, processes: int) -> float:
        """Return the factor on all learning rates."""
        return float(self.instance_images_per_step(processes)) if self.scale_lr else 1.0

    def check(self) -> None:
        """Check what goes with the optimizer."""
        name, spec = f"optimizer={self.optimizer!r}", self.optimizer_spec
        if spec.estimates_step_size and self.scale_lr:
            raise UserError(f"{name}: estimates its step size itself; expected scale_lr=False")
        if spec.averages_steps and self.use_ema:
            raise UserError(f"{name}: is an average of its steps already; expected use_ema=False")
        if spec.averages_steps and self.train_token and self.train_text_encoder_ti_frac not in (0, 1):
            found = f"train_text_encoder_ti_frac={self.train_text_encoder_ti_frac}"
            raise UserError(f"{name}, {found}: expected 1, since an average over all steps is saved")
