"""The config of a classifier's training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from atomdiff.training.config.data import ImageConfig
from atomdiff.training.config.optimizer import OptimizerConfig, ParameterGroup
from atomdiff.training.config.run import LoggingConfig, RunConfig
from atomdiff.utils.choices import Precision, Schedule
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import BatchSize, NonNegativeFloat, PositiveInt, Range
from atomdiff.utils.paths import InputPath, PathText

LINEAR = "linear"
_HEAD_LEARNING_RATE = 3e-3

BatchNorm = Literal["frozen", "updated"]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(LoggingConfig, OptimizerConfig, ImageConfig, RunConfig):
    """Fine-tune an image classifier on folders of images.

    Fields known from diffusers' training scripts mean the same here.
    """

    pretrained_model_name_or_path: PathText
    """Base model: a folder or Hub id of any image classifier of transformers (ResNet, ConvNeXt, ...)."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a base model on the Hub."""
    output_dir: PathText = "out/classifier"
    """Output folder: trained classifier, log and report."""
    adapter: PathText = "atoms"
    """What to train beside the classification head: a JSON file with the config of any PEFT method, "atoms" (filter
    atoms with their default settings), "linear" (nothing), or "full" (all weights)."""
    mixed_precision: Precision | None = None
    """Precision of the computation; weights stay in float32. Default: the setting of `accelerate config`; without one,
    bf16 where the hardware supports it, else no (float32)."""
    train_data_dir: InputPath
    """Folder of training images, with a subfolder for each class; or with subfolders train, validation and test, each
    with a subfolder for each class."""
    from_scratch: bool = False
    """Train from random weights. Needs adapter "full"; of the base model only config.json is read."""

    validation_share: Annotated[float, Range(0.001, 0.9)] = 0.1
    """Fraction of each class held out for validation, if there is no subfolder validation."""
    test_share: Annotated[float, Range(0, 0.9)] = 0.2
    """Fraction of each class held out for the test, if there is no subfolder train; 0 for no test."""
    resolution: Annotated[int, Range(1, 8192)] | None = None
    """Side length of the images in pixels. Default: that of the base model's image processor, else of its config."""
    random_resized_crop: Annotated[float, Range(0.01, 1)] = 1.0
    """Minimum area of random resized crops, as a fraction of the image; 1 turns them off."""
    dataloader_num_workers: Annotated[int, Range(0, 1024)] = 0
    """Number of processes that load images; 0 for the training process itself."""

    learning_rate: NonNegativeFloat | None = None
    """Learning rate of all but the head. Default: the value in overrides.yaml beside the adapter's JSON file; without
    one, that of the optimizer, or 1e-4 with adapter "full"."""
    head_learning_rate: NonNegativeFloat | None = None
    """Learning rate of the classification head, which is always trained, from random weights. Default: 3e-3, or 1 with
    prodigy."""
    batch_norm: BatchNorm | None = None
    """Running statistics of batch norms: "frozen", or "updated" by the training images and saved with the head.
    Default: frozen with adapter "linear", so that features stay those of the base model; else updated."""
    lr_scheduler: Schedule = "cosine"
    """Learning-rate schedule."""
    train_batch_size: BatchSize = 32
    """Training images per step and process."""
    eval_batch_size: BatchSize = 64
    """Batch size of validation and test."""

    validation_steps: PositiveInt = 50
    """Steps between validations. The last step is validated too; the weights of the best one are saved."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many validations in a row without improvement. Default: never."""

    @property
    def updates_batch_norm(self) -> bool:
        """Whether batch norms follow the training images."""
        return (self.batch_norm or ("frozen" if self.adapter == LINEAR else "updated")) == "updated"

    @property
    def learning_rates(self) -> dict[ParameterGroup, float]:
        """The learning rate of each group of parameters that the run may train."""
        default = self.optimizer_spec.learning_rate if self.optimizer_spec.estimates_step_size else _HEAD_LEARNING_RATE
        head = default if self.head_learning_rate is None else self.head_learning_rate
        return super().learning_rates | {"head": head}

    def snapshot(self) -> dict[str, Any]:
        """Return all fields but the output folder, with the learning rates that are used, ready for JSON."""
        rates = {"learning_rate": self.learning_rates["adapter"], "head_learning_rate": self.learning_rates["head"]}
        return {name: value for name, value in asdict(self).items() if name != "output_dir"} | rates

    def check(self) -> None:
        """Check that images are left to train on, and that running statistics go with the optimizer."""
        if self.validation_share + self.test_share >= 1:
            found = f"{self.validation_share} and test_share={self.test_share}"
            raise UserError(f"validation_share={found}: expected a sum below 1, so that something is left to train on")
        if self.optimizer_spec.averages_steps and self.updates_batch_norm:
            expected = "expected batch_norm frozen, as running statistics do not belong to an average of steps"
            raise UserError(f"optimizer={self.optimizer!r}: {expected}")
