"""Settings of the filter-atom tuner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from atomdiff.atoms.settings import AtomSettings
from atomdiff.tuner.peft_type import ATOMS
from atomdiff.utils.sizes import parse_bytes

PRESETS = ("conv", "conv+proj", "attention", "cross_attention", "all")


@dataclass
class AtomConfig(AtomSettings, PeftConfig):
    """Filter-atom tuning: W seen as rows X = A @ D + residual becomes X + A @ dD, and only dD is trained.

    Chen, Miao, Qiu, "Large Convolutional Model Tuning via Filter Subspace", arXiv 2403.00269.

    Raises:
        ValueError: a field has a value it may not have, or two fields contradict each other.
    """

    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: 'conv' (kernels larger than 1x1; the default), 'conv+proj' (1x1 convolutions "
            "and Linear proj_in and proj_out, too), 'attention' (its Linear projections), 'cross_attention' (those "
            "of attention to another sequence), 'all' (every layer that atoms can adapt), a list of names or endings, "
            "or a regular expression of the whole name."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Layers to leave out: a list of names or endings, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Adapt only layers of these indexes, as PEFT counts them: see layers_pattern."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in, such as 'layers'."}
    )
    select: Literal["all", "adaptive"] = field(
        default="all",
        metadata={
            "help": "Which of the target layers stay: 'all', or 'adaptive', those whose score, trained with the atoms, "
            "is at least 0.1; the others leave the concept file."
        },
    )
    select_penalty: float = field(
        default=0.01,
        metadata={
            "help": "With select='adaptive': what the mean of the layers' scores adds to the loss of a training run, "
            "times this. With more, fewer layers stay."
        },
    )
    select_budget: str | int | None = field(
        default=None,
        metadata={
            "help": "With select='adaptive': bytes that the concept file, or a classifier's adapter, may have, such as "
            "'8KB'. From half of the steps on, only the layers with the highest scores that fit are trained."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained and saved whole beside the atoms, such as a new head."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start with deltas of zero, so without an effect; False: with random ones, for tests. Atoms are "
            "fitted in any case."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        PeftConfig.__post_init__(self)  # type: ignore[no-untyped-call]
        AtomSettings.__post_init__(self)
        self.peft_type = ATOMS
        if self.target_modules is None:
            self.target_modules = "conv"
        elif not isinstance(self.target_modules, str):
            self.target_modules = sorted(self.target_modules)
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = sorted(self.exclude_modules)
        self._check_combinations()

    @property
    def budget(self) -> int | None:
        """Bytes that a concept file, or a classifier's adapter, may have; None: any number."""
        return None if self.select_budget is None else parse_bytes(self.select_budget, "select_budget")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, the same for every run."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def _check_kinds(self) -> None:
        super()._check_kinds()
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            if not _are(str, getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a name or a list of names")
        if not _are(int, self.layers_to_transform):
            raise ValueError(f"layers_to_transform={self.layers_to_transform!r}: expected a number or a list of them")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights={self.init_weights!r}: expected true or false")

    def _check_values(self) -> None:
        super()._check_values()
        if self.select not in ("all", "adaptive"):
            raise ValueError(f"select={self.select!r}: expected 'all' or 'adaptive'")
        if type(self.select_penalty) not in (int, float) or not 0 <= self.select_penalty < math.inf:
            raise ValueError(f"select_penalty={self.select_penalty!r}: expected a number of at least 0, such as 0.01")
        if self.select_budget is not None:
            parse_bytes(self.select_budget, "select_budget")

    def _check_combinations(self) -> None:
        if self.select_budget is not None and self.select != "adaptive":
            raise ValueError(
                f"select_budget={self.select_budget!r} with select={self.select!r}: layers leave for a budget only "
                "with select='adaptive'; a file of all layers can be made smaller by `atomdiff prune`"
            )
        if self.layers_to_transform is not None and not (
            isinstance(self.target_modules, list) or self.target_modules in PRESETS
        ):
            raise ValueError(
                f"layers_to_transform with target_modules={self.target_modules!r}: a regular expression itself chooses "
                "the layers; use a list of names or one of the presets " + ", ".join(PRESETS)
            )


def _are(kind: type, value: Any) -> bool:
    """Whether a value is of this type, or a collection of such values, or None."""
    values = value if isinstance(value, (list, tuple, set, range)) else [] if value is None else [value]
    return all(type(each) is kind for each in values)
