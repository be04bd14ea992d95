"""Which run to repeat, and where."""

from __future__ import annotations

from dataclasses import dataclass

from atomdiff.utils.fields import ConfigGroup, ExistingPath, NonNegativeFloat
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class RerunConfig(ConfigGroup):
    """Repeat a training run by the record in its folder, and compare settings, data, losses and the concept file."""

    folder: ExistingPath
    """The run's output_dir."""
    output_dir: PathText | None = None
    """Output folder of the repetition. Default: that of the run, with "-rerun" after its name."""
    instance_data_dir: PathText | None = None
    """Where the instance images are now. Default: where they were."""
    pretrained_model_name_or_path: PathText | None = None
    """Where the base model is now. Default: where it was."""
    allow_changes: bool = False
    """Train even if images, captions, masks or the base have changed; the comparison says what has."""
    tolerance: NonNegativeFloat = 0.0
    """How far the trained tensors may be apart, the norm of their difference as a share of their own, for the results
    to count as the same. Default: not at all, and the metadata are the same, too. The exit status is 3 if they differ.
    """
