"""Weights of adapters: in all, by block of the model, and by denoising step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from atomdiff.bases.find import BASES
from atomdiff.utils.errors import UserError

_EXPECTED = (
    "give a number, or {'weight': number, 'blocks': {'down': number, 'up.1': number}, 'steps': {0: number, 1: number}, "
    "'keep': number}"
)


@dataclass(frozen=True)
class AdapterWeight:
    """A concept's weight, times that of the block of the model, times that of the denoising step."""

    weight: float = 1.0
    """1 is as trained, 0 is without the concept."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Block -> factor: "down", "mid", "up", "up.1", "down_blocks.0.attentions", "text_encoder" or any other path of a
    module. Of several that match, the one that goes furthest into the model counts; blocks not named have the factor
    1."""
    steps: Mapping[float, float] = field(default_factory=dict)
    """Share of the denoising steps done, 0 to 1 -> factor, on straight lines between. Text encoders have none."""
    keep: float = 1.0
    """Share of the concept that is kept, its most important directions first: 1 is all of it, 0 is none."""

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Mapping) or not isinstance(self.steps, Mapping):
            raise UserError(f"found the adapter weight {self}: {_EXPECTED}")
        numbers = [self.weight, *self.blocks.values(), *self.steps.values()]
        if not all(_is_number(number) for number in numbers):
            raise UserError(f"found the adapter weight {self}: {_EXPECTED}, all finite")
        if not all(_is_number(share) and 0 <= share <= 1 for share in self.steps):
            raise UserError(f"steps={dict(self.steps)}: expected shares of the denoising steps, from 0 to 1")
        if not (_is_number(self.keep) and 0 <= self.keep <= 1):
            raise UserError(f"keep={self.keep!r}: expected a share of the concept, from 0 to 1")
        object.__setattr__(self, "keep", float(self.keep))
        object.__setattr__(self, "weight", float(self.weight))
        object.__setattr__(self, "blocks", {block_path(key): float(value) for key, value in self.blocks.items()})

    @classmethod
    def read(cls, value: Any) -> AdapterWeight:
        """Make an adapter weight of a number, of a mapping with its fields, or of blocks as diffusers nests them.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(value, AdapterWeight):
            return value
        if isinstance(value, Real):
            return cls(value)  # type: ignore[arg-type]  # the numbers of NumPy are real, but no floats
        if not isinstance(value, Mapping):
            raise UserError(f"found the adapter weight {value!r}: {_EXPECTED}")
        if not set(value) <= {"weight", "blocks", "steps", "keep"}:
            return cls(blocks=dict(_flat(value)))
        steps = value.get("steps", {})
        try:
            pairs = dict(steps.items() if isinstance(steps, Mapping) else steps)
            steps = {float(share): factor for share, factor in pairs.items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"found steps={steps!r}: {_EXPECTED}") from error
        return cls(value.get("weight", 1.0), dict(_flat(value.get("blocks", {}))), steps, value.get("keep", 1.0))

    @property
    def is_plain(self) -> bool:
        """Whether it is a number."""
        return not (self.blocks or self.steps) and self.keep == 1

    def at_step(self, progress: float) -> AdapterWeight:
        """The weight that counts, by block alone, when this share of the denoising steps is done."""
        if not self.steps:
            return self
        return replace(self, weight=self.weight * self._step_factor(progress), steps={})

    def at(self, module: str, progress: float | None) -> float:
        """The weight of one layer.

        Args:
            module: its path with the component, such as `unet.conv_in`.
            progress: share of the denoising steps done; None: no matter.
        """
        if not self.keep:
            return 0.0
        reach = {part: _reach(module, part) for part in self.blocks}
        furthest = max(reach, key=reach.__getitem__, default="")
        factor = self.blocks[furthest] if reach.get(furthest) else 1.0
        if self.steps and progress is not None:
            factor *= self._step_factor(progress)
        return self.weight * factor

    def _step_factor(self, progress: float) -> float:
        shares = sorted(self.steps)
        return float(np.interp(progress, shares, [self.steps[share] for share in shares]))

    def check(self, name: str, modules: Iterable[str]) -> None:
        """Check that every block has a layer of the concept.

        Raises:
            UserError: one does not; it names what there is.
        """
        modules = list(modules)
        for part in self.blocks:
            if not any(_reach(module, part) for module in modules):
                blocks = sorted({".".join(module.split(".")[:3]) for module in modules})
                raise UserError(f"{name!r} has no layer in {part!r}; it has layers in: {', '.join(blocks) or 'none'}")


def block_path(key: str) -> str:
    """Return a block's path as modules have it: `up_blocks.1` of `up.block_1`, `unet.up_blocks.1` of `unet.up.1`."""
    names = [re.sub(r"^block_(\d+)$", r"\1", name) for name in key.split(".")]
    parts = {short: path for base in BASES for short, path in base.block_names.items()}
    first = 1 if len(names) > 1 and names[1] in parts else 0
    return ".".join([*names[:first], parts.get(names[first], names[first]), *names[first + 1 :]])


def command_line_weights(
    concepts: Sequence[str], weights: Sequence[Any] = (), trigger_words: Sequence[str] = ()
) -> list[AdapterWeight]:
    """Read the adapter weights of a command line, one a concept; 1 where there are none.

    Raises:
        UserError: a weight cannot be read, or there are weights or trigger words, but not one each.
    """
    for name, given in (("weights", weights), ("trigger_words", trigger_words)):
        if given and len(given) != len(concepts):
            raise UserError(f"found {len(given)} {name} for {len(concepts)} concepts; give one each, or none")
    return [AdapterWeight.read(weight) for weight in weights or [1.0] * len(concepts)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # type: ignore[operator]


def _reach(module: str, part: str) -> int:
    """How far into a module's path, with its component or without, a part goes; 0 if the module is not in it."""
    for start in (0, module.find(".") + 1):
        if f"{module[start:]}.".startswith(f"{part}."):
            return start + len(part)
    return 0


def _flat(blocks: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    if not isinstance(blocks, Mapping) or not all(isinstance(key, str) and key for key in blocks):
        raise UserError(f"found blocks {blocks!r}: {_EXPECTED}")
    for key, value in blocks.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):  # diffusers: one for each attention of a block
            yield from ((f"{prefix}{key}.attentions.{index}", factor) for index, factor in enumerate(value))
        else:
            yield f"{prefix}{key}", value
