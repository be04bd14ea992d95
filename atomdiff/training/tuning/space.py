"""The search space: which options of a run and fields of its adapter are searched, and where."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.data import PreservationConfig
from atomdiff.training.config.optimization import OptimizationConfig
from atomdiff.training.config.optimizer import OptimizerConfig
from atomdiff.training.config.prompt import TextConfig
from atomdiff.training.config.run import StepsConfig
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.assets import find_asset
from atomdiff.utils.atomic import write_json
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_values
from atomdiff.utils.paths import path_fields
from atomdiff.utils.text_files import read_yaml

ADAPTER = "adapter."

# Settings of groups that leave the measurement of the validation loss as it is, so that trials can be compared by it.
_GROUPS = (StepsConfig, OptimizerConfig, TextConfig, OptimizationConfig, PreservationConfig)
_SEARCHABLE = {name for group in _GROUPS for name in vars(group)["__annotations__"]} - {*path_fields(TrainConfig)}
_RANGE = {"low", "high", "step", "log", "when"}

Value = str | int | float | bool


@dataclass(frozen=True)
class Parameter:
    """A setting that is searched: a range, or choices."""

    name: str
    """An option of a run, or a field of its adapter's config after "adapter."."""
    choices: tuple[Value | None, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    when: Mapping[str, tuple[Any, ...]] | None = None
    """Values of earlier parameters with which this one is searched."""

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return not self.choices and isinstance(self.low, int) and isinstance(self.high, int)

    def is_used(self, values: Mapping[str, Any]) -> bool:
        """Return whether it is searched in a trial with these values of earlier parameters."""
        return all(values.get(name) in allowed for name, allowed in (self.when or {}).items())

    def suggest(self, trial: optuna.Trial) -> Any:
        """Let a trial choose a value."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if self.is_whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The choices, or the ends of the range."""
        return self.choices or (self.low, self.high)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, in the order in which it is chosen."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Let a trial choose values of all parameters that it has."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_used(values):
                values[parameter.name] = parameter.suggest(trial)
        return values

    def own_values(self, run: TrainConfig) -> dict[str, Any] | None:
        """Return the values that a run has by itself; None if one is outside of the space."""
        own = _settings(run)
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_used(values):
                values[parameter.name] = own.get(parameter.name)
                if values[parameter.name] not in parameter:
                    return None
        return values

    def with_own_choices(self, run: TrainConfig) -> SearchSpace:
        """Return the space with the run's own value among the choices of each parameter."""
        own = _settings(run)

        def extended(parameter: Parameter) -> Parameter:
            value = own.get(parameter.name)
            if not parameter.choices or value in parameter.choices or isinstance(value, (list, dict)):
                return parameter
            return replace(parameter, choices=(value, *parameter.choices))

        return SearchSpace(tuple(map(extended, self.parameters)))

    def check(self, run: TrainConfig, file: str) -> None:
        """Check that a run accepts each end of each range, and each choice, one at a time.

        Raises:
            UserError: It does not; the message names the file of the space, the parameter and the value.
        """
        with tempfile.TemporaryDirectory() as folder:
            for parameter in self.parameters:
                needed = {name: allowed[0] for name, allowed in (parameter.when or {}).items()}
                for value in parameter.ends:
                    try:
                        read_adapter(apply_values({**needed, parameter.name: value}, run, Path(folder)).adapter)
                    except UserError as error:
                        raise UserError(f"{file}: {parameter.name}={value!r}: {error}") from error


def apply_values(values: Mapping[str, Any], run: TrainConfig, folder: Path) -> TrainConfig:
    """Return a run with these values; the config of its adapter is written to `folder` if it differs.

    Raises:
        UserError: The run refuses a value.
    """
    options = {name: value for name, value in values.items() if not name.startswith(ADAPTER)}
    fields = {name.removeprefix(ADAPTER): value for name, value in values.items() if name.startswith(ADAPTER)}
    if fields:
        content = _adapter_fields(run.adapter) | fields
        file = folder / f"adapter-{hash_values(json.dumps(content, sort_keys=True))[:8]}.json"
        write_json(file, content)
        options["adapter"] = str(file)
    return replace(run, **options)


def describe_values(values: Mapping[str, Any]) -> str:
    """Return the values of a trial for people to read."""
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def read_space(file: str) -> SearchSpace:
    """Read a search space.

    Args:
        file: YAML, a mapping of names of parameters to choices, a list, or to a mapping: `low` and `high`, and perhaps
            `step` or `log: true`, or `choices`; and perhaps `when`, a mapping of earlier parameters to the values, or
            lists of them, with which this one is searched. Ranges between whole numbers are of whole numbers.

    Raises:
        UserError: It cannot be read, or is none.
    """
    content = read_yaml(find_asset(file))
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: expected a mapping of options to ranges, such as learning_rate: {{low: 1e-4, ...}}")
    parameters: list[Parameter] = []
    for name, found in content.items():
        if not isinstance(name, str) or name not in _SEARCHABLE and not name.startswith(ADAPTER):
            known = ", ".join(sorted(_SEARCHABLE))
            why = "others are not searched, or trials could not be compared by their validation loss"
            raise UserError(
                f"{file}: found {name!r}; expected {ADAPTER}NAME of a field of the adapter, or {known}; {why}"
            )
        try:
            parameters.append(_parameter(name, found, {each.name: each for each in parameters}))
        except ValueError as error:
            raise UserError(f"{file}: {name}: {error}") from error
    return SearchSpace(tuple(parameters))


def _parameter(name: str, found: Any, earlier: Mapping[str, Parameter]) -> Parameter:
    content = {"choices": found} if isinstance(found, list) else found
    if not isinstance(content, dict):
        raise ValueError(f"found {found!r}; expected a list of choices, or a mapping with low and high")
    when = _condition(content.get("when"), earlier)
    if "choices" in content:
        choices, unknown = content["choices"], sorted(map(str, content.keys() - {"choices", "when"}))
        scalars = isinstance(choices, list) and all(isinstance(each, (str, int, float)) for each in choices)
        if not scalars or len(choices) < 2 or unknown:
            raise ValueError(f"found {found!r}; expected a list of two or more texts, numbers or truth values")
        return Parameter(name, tuple(choices), when=when)
    numbers = [content.get(key) for key in ("low", "high", "step") if key in content]
    if not {"low", "high"} <= content.keys() <= _RANGE or not all(type(each) in (int, float) for each in numbers):
        raise ValueError(f"found {found!r}; expected numbers for low and high, and perhaps step, log or when")
    low, high, step, log = content["low"], content["high"], content.get("step"), content.get("log", False)
    if not low < high or not isinstance(log, bool) or (log and (low <= 0 or step)) or (step is not None and step <= 0):
        raise ValueError(f"found {found!r}; expected low below high; with log: true, above 0 and without step")
    return Parameter(name, low=low, high=high, step=step, log=log, when=when)


def _condition(found: Any, earlier: Mapping[str, Parameter]) -> dict[str, tuple[Any, ...]] | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"when: found {found!r}; expected a mapping such as {{preservation: class}}")
    when = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in found.items()}
    for name, values in when.items():
        if name not in earlier or any(value not in earlier[name] for value in values):
            raise ValueError(f"when: found {name}: {found[name]!r}; expected a parameter above, and values of it")
    return when


def _settings(run: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run that may be searched, by the names of their parameters."""
    adapter = describe_adapter(read_adapter(run.adapter))
    return {**run.snapshot(), **{f"{ADAPTER}{name}": value for name, value in adapter.items()}}


def _adapter_fields(adapter: str) -> dict[str, Any]:
    """Return what stands in the JSON file of an adapter."""
    if adapter in ("atoms", "full", "none"):
        return {"peft_type": adapter.upper()}
    read_adapter(adapter)
    fields: dict[str, Any] = read_yaml(find_asset(adapter))
    return fields
