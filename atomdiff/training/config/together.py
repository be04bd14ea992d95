"""How many subjects of a list are trained together."""

from __future__ import annotations

from dataclasses import dataclass

from atomdiff.utils.fields import BatchSize, ConfigGroup


@dataclass(frozen=True, kw_only=True)
class TogetherConfig(ConfigGroup):
    """Subjects in one batch."""

    subjects_per_batch: BatchSize = 1
    """Subjects of concepts_list that are trained at the same time, in one batch on one base, with train_batch_size
    images of each. The concepts are those of one run after the other, but for rounding."""
