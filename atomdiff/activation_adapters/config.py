"""The settings that all adapters of activations have."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

from atomdiff.tuner.peft_type import add_member


@dataclass
class ActivationConfig(PeftConfig):
    """Which modules are adapted.

    Raises:
        ValueError: a field has a value that it may not have.
    """

    METHOD: ClassVar[str]
    """Name of the method in PEFT's list."""
    PRESET: ClassVar[str]
    """The `target_modules` that stands for all modules that the method is meant for."""

    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: the method's preset ('blocks', 'conv' or 'attention'; the default), a list of "
            "names or endings, or a regular expression of the whole name."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to leave out: a list of names or endings, or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained and saved whole beside the adapters, such as a new head."},
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = add_member(self.METHOD)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)) and all(isinstance(each, str) for each in value):
                setattr(self, name, sorted(value))
            elif not isinstance(value, (str, type(None))):
                raise ValueError(f"{name}={value!r}: expected a name or a list of names")
        self.target_modules = self.target_modules or self.preset

    @property
    def preset(self) -> str:
        """The `target_modules` that stands for all modules that these settings are meant for."""
        return self.PRESET

    def match(self, name: str) -> bool:
        """Whether a module of this name is meant; all are by the preset, unless they are excluded."""
        config = self
        if self.target_modules == self.preset:
            config = copy.copy(self)
            config.target_modules = [name.rpartition(".")[2]]
        return bool(check_target_module_exists(config, name)) and not self.excludes(name)

    def excludes(self, name: str) -> bool:
        """Whether a module of this name is left out."""
        return isinstance(check_target_module_exists(self, name), _ExcludedModule)
