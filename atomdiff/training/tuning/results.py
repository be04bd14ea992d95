"""What a search leaves: the best settings as a config file, a table of trials, and two plots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
import yaml
from matplotlib import pyplot, rc_context
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.output import HubConfig
from atomdiff.training.config.tune import TuneConfig
from atomdiff.training.tuning.space import SearchSpace, apply_values, describe_values
from atomdiff.training.tuning.study import finished_trials
from atomdiff.training.tuning.trial import DRIFT, SECONDS, STEP
from atomdiff.utils.atomic import new_file, write_text
from atomdiff.utils.tables import to_csv, to_markdown

BEST_FILE, TABLE_FILE, CSV_FILE = "best.yaml", "trials.md", "trials.csv"
PLOTS = ("history.png", "parallel_coordinates.png")

_NOTED = (DRIFT, STEP, SECONDS)
_TARGET = "validation loss"


@dataclass(frozen=True)
class Results:
    """What a search has found so far."""

    trials: int
    """How many trials have ended."""
    best: FrozenTrial | None
    """The complete trial with the lowest validation loss within the limit of drift; None: there is none."""
    best_file: Path | None
    """Its settings, for `atomdiff train --config`."""
    folder: Path

    def describe(self) -> str:
        """Return it in a few lines."""
        trials = f"{self.trials} trial{'s' * (self.trials != 1)}"
        if self.best is None:
            advice = "raise --max_base_drift, search lower learning rates, or run more trials"
            return f"{trials}, none complete with a base drift within the limit: {advice}"
        return (
            f"{trials}; the best is {self.best.number}: validation loss {self.best.value:.5f}, "
            f"{describe_values(self.best.params)}\n"
            f"train with it: atomdiff train --config {self.best_file}\n"
            f"{self.folder / TABLE_FILE}, {', '.join(PLOTS)}"
        )


def write_results(study: optuna.Study, folder: Path, config: TuneConfig, space: SearchSpace, interval: int) -> Results:
    """Write what a search has found so far; a table without trials is not written, and no plots without two.

    Args:
        study: The search.
        folder: Where the files go.
        config: Its options.
        space: What is searched.
        interval: Steps between two measurements of a trial.

    Raises:
        WriteError: Something cannot be written.
    """
    trials = finished_trials(study)
    names = [parameter.name for parameter in space.parameters]
    if trials:
        write_text(folder / CSV_FILE, to_csv([_row(trial, names) for trial in trials]))
        write_text(folder / TABLE_FILE, _markdown(trials, names, config.max_base_drift))
    if sum(trial.state == TrialState.COMPLETE for trial in trials) > 1:
        _draw(study, folder, trials, names)
    best_file = folder / BEST_FILE
    try:
        best = study.best_trial
    except ValueError:  # none is complete and within the limit
        best_file.unlink(missing_ok=True)
        return Results(len(trials), None, None, folder)
    write_text(best_file, _best_config(best, folder, config, interval))
    return Results(len(trials), best, best_file, folder)


def _best_config(best: FrozenTrial, folder: Path, config: TuneConfig, interval: int) -> str:
    """Return the YAML file of the best run: all that is not a default, but nothing of the Hub."""
    run = apply_values(best.params, config.base_run, folder)
    hidden = {"output_dir", "resume_from_checkpoint", *(field.name for field in fields(HubConfig))}
    values = {
        field.name: value
        for field in fields(TrainConfig)
        if field.name not in hidden and (value := getattr(run, field.name)) != field.default
    }
    values["output_dir"] = str(folder / "best")
    if run.keep_best:  # which can be the best of what was measured only
        values["validation_loss_steps"] = interval
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    drift = f", base drift {best.user_attrs[DRIFT]:.4f}" if DRIFT in best.user_attrs else ""
    head = f"# Trial {best.number} of the search in {folder}: validation loss {best.value:.6f}{drift}.\n"
    return head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _row(trial: FrozenTrial, names: Sequence[str]) -> dict[str, Any]:
    noted = {name: trial.user_attrs.get(name) for name in _NOTED}
    settings = {name: trial.params.get(name) for name in names}
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "validation_loss": trial.value,
        **noted,
        **settings,
    }


def _markdown(trials: Sequence[FrozenTrial], names: Sequence[str], max_base_drift: float | None) -> str:
    """Return the table of all trials: complete ones first, then those within the limit of drift, then by the loss."""

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        too_far = max_base_drift is not None and (row[DRIFT] or 0) > max_base_drift
        loss = row["validation_loss"]
        return row["state"] != "complete", too_far, float("inf") if loss is None else loss

    rows = sorted((_row(trial, names) for trial in trials), key=rank)
    head = "Complete trials come first, the lowest validation loss at the top."
    if max_base_drift is not None:
        head += f" Those with a base drift above {max_base_drift:g} come after the others."
    return f"{head} The loss of a pruned trial is that of its last measurement.\n\n{to_markdown(rows)}"


def _draw(study: optuna.Study, folder: Path, trials: Sequence[FrozenTrial], names: Sequence[str]) -> None:
    """Draw the history of the search, and the settings of its trials; what cannot be drawn is warned of."""
    everywhere = [name for name in names if all(name in trial.params for trial in trials)]
    drawings: dict[str, Callable[[], Any]] = {
        PLOTS[0]: lambda: plots.plot_optimization_history(study, target_name=_TARGET),
        PLOTS[1]: lambda: plots.plot_parallel_coordinate(study, everywhere or None, target_name=_TARGET),
    }
    for name, draw in drawings.items():
        try:
            with rc_context(), warnings.catch_warnings():  # Optuna changes the style, and warns that plots may change
                warnings.simplefilter("ignore")
                axes = draw()
            axes.set_title("")  # which the legend would cover
            figure = axes.figure
            figure.set_size_inches(11, 5)
            with new_file(folder / name) as file:
                figure.savefig(file, dpi=120, format="png", bbox_inches="tight")
            pyplot.close(figure)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            warnings.warn(f"{folder / name} cannot be drawn: {error}", stacklevel=1)
