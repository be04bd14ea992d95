"""`atomdiff inspect`: what a concept file holds, or what an adapter would take on a base."""

from __future__ import annotations

from dataclasses import dataclass

from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, expand_paths


@dataclass(frozen=True)
class InspectConfig:
    """Show the contents of a concept file, or count the parameters of an adapter on a base model."""

    file: PathText | None = None
    """The concept file, or the folder of another PEFT method."""
    base: PathText | None = None
    """Base model: a folder or a Hub id. With a file, the distance to the base of its training is shown. With --config,
    the weights are not needed, and sd-1.5, sd-2.1, sdxl, resnet-50 and convnext-base can be named, too."""
    config: PathText | None = None
    """Adapter config to count the parameters of: a JSON file of any PEFT method, or atoms, or full."""

    def __post_init__(self) -> None:
        """Refuse what names neither or both."""
        expand_paths(self)
        if (self.file is None) == (self.config is None):
            raise UserError("give a concept file, or --base and --config to count the parameters of an adapter")
        if self.config is not None and self.base is None:
            raise UserError(f"--config {self.config} needs --base: the model to count on, such as sd-1.5")


def inspect_concept(config: InspectConfig) -> str:
    """Return the description."""
    if config.file is not None:
        from atomdiff.cli.summary import describe

        return describe(config.file, config.base)
    from atomdiff.concepts.parameter_count import count_parameters, describe_count
    from atomdiff.tuner.read_config import read_adapter

    assert config.base is not None and config.config is not None  # as checked
    return describe_count(count_parameters(config.base, read_adapter(config.config)))
