"""The search: trials one after another on a base that is loaded once, in one process for each device."""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from atomdiff.training.anomalies import DivergedError
from atomdiff.training.base_model import load_base
from atomdiff.training.config.tune import TuneConfig
from atomdiff.training.preflight import check_runs
from atomdiff.training.processes import choose_num_workers, start_worker
from atomdiff.training.signals import StopSignals
from atomdiff.training.tuning.results import Results, write_results
from atomdiff.training.tuning.space import SearchSpace, apply_values, describe_values, read_space
from atomdiff.training.tuning.study import (
    OtherDataError,
    bind_settings,
    fail_trial,
    finished_trials,
    next_trial,
    open_study,
    recover_trials,
    try_again,
)
from atomdiff.training.tuning.trial import DRIFT, SECONDS, run_trial, trial_config, trial_folder
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.progress import log

_TRUSTED = 0.25  # share of the longest trial before which none is pruned for its loss
_MEASUREMENTS = 8  # in the longest trial, unless the run says otherwise


@dataclass(frozen=True)
class Search:
    """What all processes of a search know."""

    config: TuneConfig
    space: SearchSpace
    longest: int
    """Steps of the longest trial that there can be."""
    interval: int
    """Steps between measurements of the validation loss."""
    deadline: float
    """Seconds since 1970 after which no trial is started."""

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.config.output_dir)


def tune(config: TuneConfig) -> Results:
    """Run the trials of a search that are missing, and write its results to `config.output_dir`.

    The first trial has the run's own settings, if they are in the search space.

    Returns:
        What was found.

    Raises:
        UserError: The search space, the options or the folders do not fit, the folder holds another search, or no trial
            can be trained.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the results so far were written; trials that were stopped will be
            tried again by the same command.
    """
    started = time.time()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("found several processes of a launcher; atomdiff tune starts one a GPU itself: run it alone")
    run, folder = config.base_run, Path(config.output_dir)
    check_runs([run])
    space = read_space(config.search_space).with_own_choices(run)
    space.check(run, config.search_space)
    longest = _longest(config, space)
    # The same in all trials, or they could not be compared on the way.
    interval = config.validation_loss_steps or max(1, longest // _MEASUREMENTS)
    search = Search(config, space, longest, interval, started + (config.timeout or float("inf")))
    with lock_folder(folder):
        study = open_study(folder)
        _begin(search, study)
        before = len(finished_trials(study))
        try:
            _run_workers(search)
        finally:
            results = write_results(study, folder, config, space, interval)
            done = len(finished_trials(study)) - before
            if done:
                seconds = time.time() - started
                log(f"trials of this call: {done}, in {seconds:.0f} s; {_per_hour(done, started):.1f} an hour")
    return results


def _longest(config: TuneConfig, space: SearchSpace) -> int:
    """Return the steps of the longest trial that there can be."""
    for parameter in space.parameters:
        if parameter.name == "max_train_steps":
            return int(max(parameter.ends))
    return config.max_train_steps


def _begin(search: Search, study: optuna.Study) -> None:
    """Bind the study to its settings, and put the first trial, or those that were stopped, first."""
    run = search.config.base_run
    settings = {
        **run.snapshot(),
        "adapter": describe_adapter(read_adapter(run.adapter)),
        "keep_best": run.keep_best,
        "validation_loss_steps": search.interval,
        "max_base_drift": search.config.max_base_drift,
        "search_space": {each.name: vars(each) for each in search.space.parameters},
    }
    if not bind_settings(study, search.folder, settings):
        again = recover_trials(study)
        count = len(finished_trials(study))
        log(f"going on with the study in {search.folder}; trials done: {count}, to try again: {again}")
    elif own := search.space.own_values(run):
        study.enqueue_trial(own)
    else:
        log("the run's own settings are outside of the search space: they are not among the trials")


def _run_workers(search: Search) -> None:
    """Run trials in this process, or in several at once."""
    count = choose_num_workers(search.config.num_workers)
    if count == 1:
        work(search, 0)
        return
    log(f"trials run in {count} processes")
    with StopSignals() as stop:
        processes = [start_worker(_work_alone, (search, worker), worker, count) for worker in range(count)]
        asked = False
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.2)
            if stop.requested and not asked:
                asked = True
                for process in processes:
                    process.terminate()
    if asked:
        raise KeyboardInterrupt(_how_to_go_on(search))
    if all(process.exitcode for process in processes):
        raise UserError(f"{search.folder}: all {count} processes ended with an error; the lines above say why")
    if failed := [process for process in processes if process.exitcode]:
        warnings.warn(f"{len(failed)} of {count} processes ended with an error, see above", stacklevel=1)


def _work_alone(search: Search, worker: int) -> None:
    """Be a process that runs trials."""
    try:
        work(search, worker)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"process {worker}: {error}", file=sys.stderr)
        sys.exit(2)


def work(search: Search, worker: int) -> None:
    """Run trials until there are enough, or it is time to end.

    Raises:
        UserError: The first trial cannot be trained, or images or base have changed.
        KeyboardInterrupt: It was asked to stop.
    """
    config, folder = search.config, search.folder
    trusted = int(search.longest * _TRUSTED)
    study = open_study(folder, seed=config.seed, num_trials=config.num_trials, worker=worker, trusted_steps=trusted)
    run, started, done = config.base_run, time.time(), 0
    base = None
    with StopSignals() as stop:
        while not stop.requested and time.time() < search.deadline:
            trial = next_trial(study, folder, config.num_trials)
            if trial is None:
                break
            if base is None:
                log(f"loading the base {config.pretrained_model_name_or_path}")
                base = load_base(run)
            try:
                values = search.space.suggest(trial)
                own_folder = trial_folder(folder, trial.number)
                trained = trial_config(apply_values(values, run, own_folder), folder, own_folder, search.interval)
                log(f"trial {trial.number}: {describe_values(values)}")
                loss = run_trial(trial, trained, base, config.max_base_drift, stop)
                study.tell(trial, loss)
                outcome = f"validation loss {loss:.5f}"
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
                outcome = "pruned"
            except DivergedError:
                study.tell(trial, state=TrialState.PRUNED)
                outcome = "diverged"
            except (UserError, torch.OutOfMemoryError) as error:
                if isinstance(error, (OtherDataError, WriteError)) or not finished_trials(study):
                    try_again(study, trial)
                    raise
                fail_trial(study, trial, str(error))
                outcome = f"failed: {error}"
            except BaseException as error:
                try_again(study, trial)
                if isinstance(error, KeyboardInterrupt):
                    break
                raise
            gc.collect()
            done += 1
            _report(study, trial, outcome, done, started)
    if stop.requested:
        raise KeyboardInterrupt(_how_to_go_on(search))


def _report(study: optuna.Study, trial: optuna.Trial, outcome: str, done: int, started: float) -> None:
    """Say what a trial gave."""
    noted = trial.user_attrs
    drift = f", base drift {noted[DRIFT]:.3f}" if DRIFT in noted else ""
    seconds = f"; {noted[SECONDS]:.1f} s" if SECONDS in noted else ""
    try:
        best = f"; best {study.best_value:.5f}"
    except ValueError:  # none within the limit of drift yet
        best = ""
    log(f"trial {trial.number}: {outcome}{drift}{seconds}{best}; {_per_hour(done, started):.1f} trials an hour")


def _per_hour(done: int, started: float) -> float:
    return done / max(time.time() - started, 1e-9) * 3600


def _how_to_go_on(search: Search) -> str:
    return f"stopped; the trials so far are in {search.folder}: the same command goes on with them"
