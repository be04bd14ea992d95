"""The optimizers: an `OptimizerSpec` each, and the options of a run that they read.

To add one, add an entry to `OPTIMIZERS`; options, checks, missing packages and `--help` follow from it.

AdamW: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; its state in 8 bits: Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; Prodigy: Mishchenko, Defazio, "Prodigy: An
Expeditiously Adaptive Parameter-Free Learner", arXiv 2306.06101; schedule-free AdamW: Defazio et al., "The Road Less
Scheduled", arXiv 2405.15682.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from atomdiff.training.config.run import StepsConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import NeedsPackage, NonNegativeFloat, OneOf, PositiveFloat, PositiveInt, Share

if TYPE_CHECKING:
    from torch.optim import Optimizer  # for types alone: --help does without torch

ParameterGroup = Literal["adapter", "text_encoder", "token", "head"]
"""What has a learning rate of its own; a classifier has a head."""

Build = Callable[["OptimizerConfig", list[dict[str, Any]], dict[str, Any]], "Optimizer"]


@dataclass(frozen=True)
class OptimizerSpec:
    """What there is to know about an optimizer."""

    summary: str
    """A few words for `--help`."""
    build: Build
    """Builds it from the run's options, the parameter groups, and `lr`, `betas` and `eps`."""
    build_8bit: Build | None = None
    """The same with its state in 8 bits, for `use_8bit_adam`."""
    needs: NeedsPackage | None = None
    """Package that must be installed."""
    learning_rate: float = 5e-3
    """Default learning rate."""
    token_learning_rate: float | None = 1e-2
    """Default learning rate of token embeddings; None for that of the adapter."""
    estimates_step_size: bool = False
    """Whether it estimates the step size, so that all learning rates are about 1, and 1 by default."""
    averages_steps: bool = False
    """Whether what is saved is an average of its steps up to the end, so that it needs no schedule."""
    positive: tuple[str, ...] = ()
    """Options that have to be above 0."""
    check: Callable[[OptimizerConfig], None] = lambda config: None
    """Raises a UserError for other options that do not go with it."""

    @property
    def help(self) -> str:
        """What `--help` says."""
        token = "" if self.token_learning_rate is None else f", of token embeddings {self.token_learning_rate:g}"
        return f"{self.summary} (default learning rate {self.learning_rate:g}{token})"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(StepsConfig):
    """Optimizer."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """Optimizer. If its package is missing: pip install "atomdiff[optimizers]"."""
    use_8bit_adam: Annotated[bool, NeedsPackage("bitsandbytes", "gpu")] = False
    """Keep the state of adamw in 8 bits (tensors of at least 4096 elements); needs bitsandbytes."""
    adam_beta1: Share = 0.9
    """Decay rate of the gradients' moving average, with every optimizer."""
    adam_beta2: Share = 0.999
    """Decay rate of the squared gradients' moving average, with every optimizer."""
    adam_epsilon: NonNegativeFloat = 1e-8
    """Epsilon, with every optimizer."""
    prodigy_d_coef: PositiveFloat = 1.0
    """Factor on the step size that prodigy estimates."""
    lr_num_cycles: PositiveInt = 1
    """Number of cycles of cosine_with_restarts."""
    lr_power: NonNegativeFloat = 1.0
    """Power of the polynomial schedule."""

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """What there is to know about the optimizer."""
        return OPTIMIZERS[self.optimizer]

    @property
    def learning_rates(self) -> dict[ParameterGroup, float]:
        """The learning rate of each group of parameters that the run may train."""
        return {"adapter": self.optimizer_spec.learning_rate if self.learning_rate is None else self.learning_rate}

    def check(self) -> None:
        """Check what the optimizer needs."""
        name, spec = f"optimizer={self.optimizer!r}", self.optimizer_spec
        if self.use_8bit_adam and not spec.build_8bit:
            able = " or ".join(repr(name) for name, spec in OPTIMIZERS.items() if spec.build_8bit)
            raise UserError(f"{name}: has no 8-bit state; expected optimizer={able} with use_8bit_adam")
        moving = {rate for rate in self.learning_rates.values() if rate}
        if spec.estimates_step_size and (len(moving) > 1 or not all(0.1 <= rate <= 10 for rate in moving)):
            rates = ", ".join(f"{group} {rate:g}" for group, rate in self.learning_rates.items())
            expected = "1 for all, or close to it (the default; 0 for what is not trained)"
            raise UserError(f"{name}: found the learning rates {rates}; expected {expected}; see prodigy_d_coef")
        if spec.averages_steps and not self.lr_scheduler.startswith("constant"):
            expected = "constant or constant_with_warmup, as it needs no schedule"
            raise UserError(f"{name}, lr_scheduler={self.lr_scheduler!r}: expected {expected}")
        for field in spec.positive:
            if not getattr(self, field):
                raise UserError(f"{name}, {field}={getattr(self, field)}: expected a number above 0")
        spec.check(self)


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, fused=True, **settings)


def _adamw_8bit(config: OptimizerConfig, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    eight_bit: Optimizer = AdamW8bit(groups, **settings)
    return eight_bit


def _prodigy(config: OptimizerConfig, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from prodigyopt import Prodigy

    safe = {"use_bias_correction": True, "safeguard_warmup": True}  # as in diffusers' scripts
    prodigy: Optimizer = Prodigy(groups, d_coef=config.prodigy_d_coef, **safe, **settings)
    return prodigy


def _schedule_free(config: OptimizerConfig, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    schedule_free: Any = AdamWScheduleFree(groups, **settings)
    schedule_free.train()
    built: Optimizer = schedule_free
    return built


OPTIMIZERS = {
    "adamw": OptimizerSpec("AdamW", _adamw, build_8bit=_adamw_8bit),
    "prodigy": OptimizerSpec(
        "Prodigy, which estimates one step size for all parameters",
        _prodigy,
        needs=NeedsPackage("prodigyopt", "optimizers"),
        learning_rate=1.0,
        token_learning_rate=None,
        estimates_step_size=True,
        positive=("adam_epsilon",),
    ),
    "adamw_schedulefree": OptimizerSpec(
        "schedule-free AdamW, which averages its steps and needs no learning-rate schedule",
        _schedule_free,
        needs=NeedsPackage("schedulefree", "optimizers"),
        averages_steps=True,
        positive=("adam_beta1",),
    ),
}
