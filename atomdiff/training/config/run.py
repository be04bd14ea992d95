"""What every training run has: an adapter, an output folder, steps and logs."""

from __future__ import annotations

from dataclasses import dataclass

from atomdiff.utils.choices import Precision, Schedule
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import BatchSize, ConfigGroup, NonNegativeFloat, NonNegativeInt, PositiveInt
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigGroup):
    """Adapter and output."""

    output_dir: PathText = "out/train"
    """Output folder: trained files, checkpoints, validation images and logs."""
    adapter: PathText = "atoms"
    """What to train: a JSON file with the config of any PEFT method, "atoms" (filter atoms with their default
    settings), "full" (all weights of the UNet), or "none" (nothing of the UNet: the token embedding alone)."""
    seed: int = 0
    """Random seed. The same seed gives the same run."""
    mixed_precision: Precision | None = None
    """Precision of the computation and of the frozen weights. Default: the setting of `accelerate config`; without
    one, bf16 where the hardware supports it, else no (float32)."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig(ConfigGroup):
    """Steps, batch size and learning rate."""

    max_train_steps: PositiveInt = 400
    """Number of optimizer steps."""
    train_batch_size: BatchSize = 4
    """Training images per step and process. Class images come on top, one for each."""
    learning_rate: NonNegativeFloat | None = None
    """Learning rate of the adapter. Default: the value in overrides.yaml beside the adapter's JSON file; without one,
    that of the optimizer."""
    lr_scheduler: Schedule = "constant"
    """Learning-rate schedule."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum gradient norm, for gradient clipping; 0 turns clipping off."""
    adam_weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""

    def check(self) -> None:
        """Check that the warm-up ends within the run."""
        if self.lr_warmup_steps > self.max_train_steps:
            expected = f"expected at most max_train_steps={self.max_train_steps}"
            raise UserError(f"lr_warmup_steps={self.lr_warmup_steps}: {expected}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(ConfigGroup):
    """Validation and logging."""

    validation_steps: NonNegativeInt = 0
    """Steps between validations, each of which adds a row of images to the contact sheet; 0 for none."""
    logging_steps: PositiveInt = 10
    """Steps between log lines."""
