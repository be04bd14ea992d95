"""The study: trials and what they gave, in a SQLite file that later calls and other processes go on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from atomdiff.training.fingerprint import differences
from atomdiff.training.run_comparison import changes
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import wait_for_folder
from atomdiff.utils.seeds import derive_seed

STUDY_FILE = "study.db"

_NAME = "tune"
_SETTINGS, _DATA = "settings", "data"
_REASON = "reason"  # of a failure that the trial's settings are to blame for
_SECONDS = 120  # that a process waits for another one that writes to the file


class OtherDataError(UserError):
    """A trial would learn from other images or another base than those before it."""


def open_study(
    folder: Path, *, seed: int = 0, num_trials: int = 20, worker: int = 0, trusted_steps: int = 0
) -> optuna.Study:
    """Open the study in a folder, or make one.

    TPE (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011) chooses settings, after a quarter
    of `num_trials`, at most ten, at random. A trial is pruned if its validation loss is above the median that others
    had after the same step (Golovin et al., "Google Vizier", KDD 2017, section 3.2).

    Args:
        folder: Of the search.
        seed: Of the run; each worker, and each call, has random numbers of its own that follow from it.
        num_trials: How many trials there will be in all.
        worker: Number of the process among those of a call.
        trusted_steps: Steps before which no trial is pruned: at first, losses tell how fast a trial learns, and not how
            far it comes.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    connecting = {"connect_args": {"timeout": _SECONDS}}
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY_FILE).resolve()}", engine_kwargs=connecting)
    study = optuna.create_study(storage=storage, study_name=_NAME, direction="minimize", load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(10, max(3, num_trials // 4)),
        seed=derive_seed(seed, "search", worker, len(finished_trials(study))) % 2**32,
    )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=trusted_steps)
    return study


def bind_settings(study: optuna.Study, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Note what the trials of a study share, or check that it is what they shared so far.

    Returns:
        Whether the study is new.

    Raises:
        UserError: It is of other settings.
    """
    plain = json.loads(json.dumps(settings))
    known = study.user_attrs.get(_SETTINGS)
    if known is None:
        study.set_user_attr(_SETTINGS, plain)
        return True
    if found := changes(known, plain):
        raise UserError(f"{folder}: its study has {'; '.join(found)}. Use its values, or another output_dir")
    return False


def bind_data(study: optuna.Study, folder: Path, data: Mapping[str, Any]) -> None:
    """Note what the trials of a study learn from, or check that it is what they learned from so far.

    Raises:
        OtherDataError: It is something else.
    """
    known = study.user_attrs.get(_DATA)
    if known is None:
        study.set_user_attr(_DATA, json.loads(json.dumps(data)))
    elif found := differences(known, data):
        expected = "expected what its trials learned from: restore it, or use another output_dir"
        raise OtherDataError(f"{folder}: found {'; '.join(found)}; {expected}")


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that count: complete, pruned, or failed by their own settings; not those that were stopped."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [trial for trial in trials if trial.state != TrialState.FAIL or _REASON in trial.user_attrs]


def next_trial(study: optuna.Study, folder: Path, num_trials: int) -> optuna.Trial | None:
    """Begin a trial, unless there are enough in all processes."""
    with wait_for_folder(folder):
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if len(finished_trials(study)) + len(running) >= num_trials:
            return None
        return study.ask()


def fail_trial(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    """End a trial whose settings cannot be trained."""
    trial.set_user_attr(_REASON, reason)
    study.tell(trial, state=TrialState.FAIL)


def try_again(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
    """End a trial that was stopped; the next one will have its values."""
    study.tell(trial.number, state=TrialState.FAIL)
    if trial.params:
        study.enqueue_trial(trial.params)


def recover_trials(study: optuna.Study) -> int:
    """Let the trials of processes that were killed be tried again; return how many. No process runs any."""
    stopped = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in stopped:
        try_again(study, trial)
    return len(stopped)
