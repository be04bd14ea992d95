"""What a classifier's training run can be told: one frozen dataclass."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from atomdiff.training.config import parse_with_overrides
from atomdiff.utils.choices import Precision, Schedule
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, expand_paths

LINEAR = "linear"

BatchNorm = Literal["frozen", "updated"]


@dataclass(frozen=True)
class ClassifyConfig:
    """Tune an image classifier on folders of pictures.

    Fields that diffusers' training scripts have mean the same here.

    Raises:
        UserError: A field has a value that cannot be used; the message names field, value and what is allowed.
    """

    pretrained_model_name_or_path: PathText
    """The base: a folder or a Hub id of any image classifier of transformers (ResNet, ConvNeXt, ...)."""
    train_data_dir: PathText
    """Folder with a sub-folder of pictures for each class; or with sub-folders train, validation and test, each of them
    such a folder."""
    output_dir: PathText = "out/classifier"
    """Folder for the trained classifier, the log and the report."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    from_scratch: bool = False
    """Start from random weights of the base's architecture; needs adapter "full", and only the base's config.json."""

    validation_share: float = 0.1
    """Share of each class that is held out to choose the best step, where there is no sub-folder validation."""
    test_share: float = 0.2
    """Share of each class that is held out for the test, where there is no sub-folder train; 0 for no test."""
    resolution: int | None = None
    """Side in pixels of what the network sees. Default: what the base's own preprocessing says, else its config."""
    random_flip: bool = False
    """Mirror half of the training pictures."""
    random_resized_crop: float = 1.0
    """Cut this share of a training picture's area or more, at random, and resize it; 1 for none."""

    adapter: PathText = "atoms"
    """What is trained beside the head: a JSON file with the config of any PEFT method, or "atoms" (its defaults),
    "linear" (nothing) or "full" (everything)."""
    learning_rate: float | None = None
    """Learning rate of all but the head. Where overrides.yaml stands beside the adapter's file, its value is the
    default, else 5e-3, and 1e-4 for "full"."""
    batch_norm: BatchNorm | None = None
    """Running statistics of batch norms: "frozen", or "updated" by the pictures and saved with the head. Default:
    frozen for "linear", so that the features are the base's; else updated, as pictures of another kind need it."""
    head_learning_rate: float = 3e-3
    """Learning rate of the head, which is always trained, from random weights."""
    lr_scheduler: Schedule = "cosine"
    """Course of both learning rates over the run."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rates rise from zero."""
    max_train_steps: int = 400
    """Optimizer steps."""
    train_batch_size: int = 32
    """Pictures a step, on each process."""
    eval_batch_size: int = 64
    """Pictures at once in validation and test."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    adam_weight_decay: float = 1e-2
    """AdamW's weight decay."""
    mixed_precision: Precision | None = None
    """Precision of the arithmetic; weights stay in float32. Default: what accelerate is
    configured to, else bfloat16 where the processor or GPU has instructions for it, else float32."""
    dataloader_num_workers: int = 0
    """Processes that read pictures; 0 for the training process itself."""
    seed: int = 0
    """Every random choice follows from it: the split, the head's first weights, the batches."""

    validation_steps: int = 50
    """Steps between validations; the last step is validated in any case. The weights of the best one are kept."""
    early_stopping_patience: int | None = None
    """Stop after so many validations in a row that bring no better one. Default: never."""
    logging_steps: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        expand_paths(self)
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                below = "" if most == math.inf else f" and at most {most:g}"
                raise UserError(f"{name}={value!r}: expected a number of at least {least:g}{below}")
        choices = {"lr_scheduler": get_args(Schedule)}
        choices |= {"mixed_precision": (None, *get_args(Precision)), "batch_norm": (None, *get_args(BatchNorm))}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(str(value) for value in allowed)
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {expected}")
        if self.validation_share + self.test_share >= 1:
            found = f"{self.validation_share} and test_share={self.test_share}"
            raise UserError(f"validation_share={found}: expected a sum below 1, so that something is left to train on")

    @property
    def updates_batch_norm(self) -> bool:
        """Whether batch norms follow the pictures."""
        return (self.batch_norm or ("frozen" if self.adapter == LINEAR else "updated")) == "updated"

    def recipe(self) -> dict[str, Any]:
        """Return all fields but the folder for the results, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "output_dir"}


_FROM_ONE = (
    "resolution max_train_steps train_batch_size eval_batch_size validation_steps early_stopping_patience logging_steps"
).split()
_FROM_ZERO = (
    "learning_rate head_learning_rate lr_warmup_steps max_grad_norm adam_weight_decay dataloader_num_workers"
).split()
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_FROM_ONE, (1, 10**9)),
    **dict.fromkeys(_FROM_ZERO, (0, math.inf)),
    "resolution": (1, 8192),
    **dict.fromkeys(("train_batch_size", "eval_batch_size"), (1, 100_000)),
    "dataloader_num_workers": (0, 1024),
    "validation_share": (0.001, 0.9),
    "test_share": (0, 0.9),
    "random_resized_crop": (0.01, 1),
}


def load_config(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> ClassifyConfig:
    """Read a run's config from a command line: `--config FILE`, as often as wanted, and a flag for every field.

    Values come, the later ones winning, from the defaults, from the overrides.yaml beside the adapter's JSON file, and
    from the command line in its order.

    Args:
        arguments: The command line without the program's name, by default this process's.
        prog: The program's name in messages.

    Raises:
        UserError: A field has a value that cannot be used.
    """
    config: ClassifyConfig = parse_with_overrides(ClassifyConfig, arguments, prog)
    return config
