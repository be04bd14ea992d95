"""Where a run starts from."""

from __future__ import annotations

from dataclasses import dataclass, fields

from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, ExistingPath, PositiveInt


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig(ConfigGroup):
    """Warm start."""

    init_from: ExistingPath | None = None
    """Concept file to start from; or a folder of concept files, to start from the mean of those most similar to what a
    few steps learn. Default: deltas of zero, which change nothing."""
    init_probe_steps: PositiveInt = 20
    """Steps of the probe that finds the concepts of a folder; they come on top of max_train_steps."""
    init_concepts: PositiveInt = 3
    """How many concepts of a folder to start from, at most."""

    def check(self) -> None:
        """Check that what is set is used."""
        for field in fields(WarmStartConfig):
            if self.init_from is None and getattr(self, field.name) != field.default:
                raise UserError(f"{field.name}={getattr(self, field.name)!r}: expected init_from with it")
