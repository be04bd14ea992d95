"""What differs between two runs: settings, data, environment, losses, and the tensors of what they saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atomdiff.training.fingerprint import differences
from atomdiff.training.measurements import LOG_FILE as VALIDATION_LOG
from atomdiff.training.run_log import LOG_FILE, read_log
from atomdiff.training.run_record import read_record
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file

_DATE = "modelspec.date"
_LOSSES = {"loss": LOG_FILE, "validation_loss": VALIDATION_LOG}


@dataclass(frozen=True)
class LossDifference:
    """How far a loss of two runs is apart, at the steps that both have noted."""

    steps: int
    """How many steps both have noted."""
    first_step: int | None
    """The first of them at which the losses differ; None: at none."""
    largest: float
    """The largest absolute difference."""
    last: tuple[float, float]
    """The losses at the last of them, then and now."""


@dataclass(frozen=True)
class TensorDifference:
    """How far what two runs saved is apart."""

    equal: bool
    """Whether the files have the same bytes, but for the date in a concept file."""
    tensors: int
    """How many tensors there are, in one or both."""
    different: int
    """How many of them differ, or are unmatched."""
    unmatched: int
    """How many of them are in one alone, or have another shape or type."""
    largest: float
    """The largest absolute difference of two elements."""
    relative: float
    """Norm of the difference of all tensors that both have, as a share of the norm of the earlier ones."""


@dataclass(frozen=True)
class RunComparison:
    """What differs between an earlier run and a later one; texts are "NAME: THEN, now NOW"."""

    settings: list[str]
    data: list[str]
    environment: list[str]
    losses: dict[str, LossDifference]
    """By name, of those that both have noted."""
    result: TensorDifference | None
    """None: what the earlier run saved is gone."""
    result_changed: bool = False
    """Whether what the earlier run saved has changed since."""

    @property
    def is_equal(self) -> bool:
        """Whether both have saved the same."""
        return self.result is not None and self.result.equal

    def agrees(self, tolerance: float) -> bool:
        """Return whether both have saved the same, or tensors that are apart by no more than a share of their norm.

        Args:
            tolerance: That share. 0: metadata and bytes are the same.
        """
        if self.result is None or not tolerance:
            return self.is_equal
        return not self.result.unmatched and self.result.relative <= tolerance

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"equal": self.is_equal, **asdict(self)}

    def describe(self) -> str:
        """Return it as lines for people."""
        lines = [f"{name}: {_listed(found)}" for name, found in _named(self).items()]
        for name, loss in self.losses.items():
            what = f"the same at all {loss.steps} noted steps"
            if loss.first_step is not None:
                what = f"differs from step {loss.first_step} on, by at most {loss.largest:.3g}"
            then, now = loss.last
            lines.append(f"{name.replace('_', ' ')}: {what}; at the end {then:.6g}, now {now:.6g}")
        if self.result_changed:
            lines.append("what the earlier run saved has changed since: its SHA-256 is not that of the record")
        if self.result is None:
            lines.append("what the earlier run saved is gone; its tensors are not compared")
        elif self.result.equal:
            lines.append("result: equal to the byte, but for the date in a concept file")
        elif not self.result.different:
            lines.append("result: all tensors are equal to the bit; the metadata differ")
        else:
            found = f"{self.result.different} of {self.result.tensors} tensors differ"
            lines.append(f"result: {found}, by at most {self.result.largest:.3g} ({self.result.relative:.2%} in norm)")
        return "\n".join(lines)


def compare_runs(then: Path, now: Path) -> RunComparison:
    """Compare two finished runs by their folders.

    Raises:
        UserError: A record is missing or damaged, the later run has not ended, or a file of tensors cannot be read.
    """
    old, new = read_record(then), read_record(now)
    if new.result is None:
        raise UserError(f"{now}: this run has not ended; resume it first")
    losses = {name: _compare_losses(name, then / file, now / file) for name, file in _LOSSES.items()}
    result, changed = None, False
    if old.result is not None and (then / old.result["name"]).exists():
        earlier = then / old.result["name"]
        changed = hash_file(earlier) != old.result["sha256"]
        result = compare_tensors(earlier, now / new.result["name"])
    return RunComparison(
        settings=changes(old.settings, new.settings),
        data=differences(old.data, new.data),
        environment=changes(old.environment, new.environment),
        losses={name: loss for name, loss in losses.items() if loss is not None},
        result=result,
        result_changed=changed,
    )


def compare_tensors(then: Path, now: Path) -> TensorDifference:
    """Compare the safetensors files of two results: each a file, or a folder with the same files in it.

    Raises:
        UserError: One cannot be read.
    """
    equal, count, different, unmatched, largest, norm, apart = True, 0, 0, 0, 0.0, 0.0, 0.0
    old_files, new_files = _files(then), _files(now)
    for name in sorted(old_files.keys() | new_files.keys()):
        for old, new in _pairs(old_files.get(name), new_files.get(name)):
            count += 1
            if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
                unmatched += 1
                continue
            difference = (new.double() - old.double()).abs()
            different += not torch.equal(old, new)
            largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
            norm, apart = norm + float(old.double().square().sum()), apart + float(difference.square().sum())
        equal = equal and _metadata(old_files.get(name)) == _metadata(new_files.get(name))
    relative = (apart / norm) ** 0.5 if norm else 0.0
    different += unmatched
    return TensorDifference(equal and not different, count, different, unmatched, largest, relative)


def changes(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say which values of two nested mappings differ, as "NAME: THEN, now NOW" each."""
    found: list[str] = []
    for name in [*then, *(name for name in now if name not in then)]:
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{name}.")
        elif _plain(old) != _plain(new):
            found.append(f"{prefix}{name}: {old!r}, now {new!r}")
    return found


def _files(path: Path) -> dict[str, Path]:
    """Return the safetensors files of a result by their names in it."""
    if path.is_file():
        return {"": path}
    return {str(file.relative_to(path)): file for file in path.rglob("*.safetensors")}


def _pairs(then: Path | None, now: Path | None) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Read the tensors of two files one by one, in pairs of the same name."""
    names = [_names(file) for file in (then, now)]
    for name in sorted(names[0] | names[1]):
        old, new = (
            _read(file, name) if file is not None and name in held else None
            for file, held in zip((then, now), names, strict=True)
        )
        yield old, new


def _names(file: Path | None) -> set[str]:
    return set() if file is None else set(_opened(file)[1])


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _metadata(file: Path | None) -> dict[str, str] | None:
    """Return a file's metadata without its date."""
    if file is None:
        return None
    return {key: value for key, value in _opened(file)[0].items() if key != _DATE}


def _opened(file: Path) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of a file and the names of its tensors."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() or {}, list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); restore it from a copy") from error


def _compare_losses(name: str, then: Path, now: Path) -> LossDifference | None:
    """Compare a loss in two logs; None if they share no step that has it."""
    old, new = ({line["step"]: line[name] for line in read_log(file) if name in line} for file in (then, now))
    steps = sorted(old.keys() & new.keys())
    if not steps:
        return None
    apart = [step for step in steps if old[step] != new[step]]
    largest = max(abs(old[step] - new[step]) for step in steps)
    return LossDifference(len(steps), apart[0] if apart else None, largest, (old[steps[-1]], new[steps[-1]]))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _listed(found: list[str]) -> str:
    return "; ".join(found) or "the same"


def _named(comparison: RunComparison) -> dict[str, list[str]]:
    return {"settings": comparison.settings, "data": comparison.data, "environment": comparison.environment}
