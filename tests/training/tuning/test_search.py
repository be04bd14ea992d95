"""Searches of settings from end to end, on the tiny base."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from atomdiff.cli.main import main
from atomdiff.training.anomalies import DivergedError
from atomdiff.training.base_model import load_base
from atomdiff.training.config import load_config
from atomdiff.training.dreambooth import train
from atomdiff.training.tuning import results, search, trial
from atomdiff.training.tuning.search import tune
from atomdiff.training.tuning.study import finished_trials, open_study
from atomdiff.utils.errors import UserError
from tests.helpers import assert_unchanged, read_measurements, snapshot


def trials_of(config):
    return finished_trials(open_study(Path(config.output_dir)))


def states(config):
    return [each.state.name for each in trials_of(config)]


@pytest.mark.slow
def test_a_search_ends_with_a_config_that_trains_to_the_same_loss(tune_config, capsys):
    config = tune_config()
    found = tune(config)
    folder = Path(config.output_dir)
    first, *others = trials_of(config)
    assert len(others) == 2 and first.params["max_train_steps"] == 2  # the run's own settings come first
    assert first.params["learning_rate"] == 0.005 and first.params["adapter.channel_block"] == 4
    complete = [each for each in (first, *others) if each.value is not None]
    assert found.best.value == min(each.value for each in complete)
    assert {*found.best.user_attrs} == {"base_drift", "step", "seconds"}

    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["learning_rate"]) == 0.005 and float(rows[0]["validation_loss"]) == first.value
    table = (folder / "trials.md").read_text().splitlines()
    assert "at the top. The loss of a pruned trial" in table[0] and "drift" not in table[0]  # there is no limit
    assert len(table) == 4 + 3 and table[4].startswith(f"| {found.best.number} | complete | ")
    for name in ("history.png", "parallel_coordinates.png"):
        assert Image.open(folder / name).size > (300, 300)
    told = capsys.readouterr().err
    assert told.count("loading the base") == 1 and "trials an hour" in told and "trial 0: validation loss" in told

    best = load_config(["--config", str(found.best_file)])
    assert best.output_dir == str(folder / "best") and best.validation_split == 0.2
    assert best.learning_rate == found.best.params["learning_rate"]
    train(best)  # loads the base itself
    assert read_measurements(best)[-1]["validation_loss"] == found.best.value


@pytest.mark.slow
def test_trials_leave_the_base_that_they_share_as_it_was(tune_config, monkeypatch):
    seen = []

    def load(config):
        pipe = load_base(config)
        seen.append((pipe, snapshot(pipe)))
        return pipe

    monkeypatch.setattr(search, "load_base", load)
    tune(tune_config(num_trials=2, train_text_encoder=True, plain_attention=True))
    ((pipe, before),) = seen
    assert_unchanged(pipe, before)


def test_the_same_search_chooses_the_same_settings(tune_config, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_trial", lambda _, run, *__: abs(run.learning_rate - 0.02))
    monkeypatch.setattr(results, "_draw", lambda *_: None)
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tune_config(output_dir=str(tmp_path / name), seed=seed, num_trials=6)
        tune(config)
        chosen.append([each.params for each in trials_of(config)])
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0][0] == chosen[2][0]


@pytest.mark.slow
def test_a_search_goes_on_up_to_the_number_of_trials(tune_config, capsys):
    config = tune_config(num_trials=1)
    tune(config)
    assert tune(config).trials == 1
    more = dataclasses.replace(config, num_trials=3, timeout=1e-9)
    assert tune(more).trials == 1  # no time
    assert tune(dataclasses.replace(more, timeout=None)).trials == 3
    assert "going on with the study" in capsys.readouterr().err
    assert len({str(each.params) for each in trials_of(config)}) == 3
    with pytest.raises(UserError, match=r"its study has train_batch_size: 2, now 1\. Use its values, or another"):
        tune(dataclasses.replace(more, train_batch_size=1))


def test_other_images_are_refused(tune_config, teapot_images):
    config = tune_config(num_trials=1)
    tune(config)
    for name, color in {"0.png": "red", "1.png": "green", "2.png": "blue"}.items():
        Image.new("RGB", (32, 32), color).save(teapot_images / name)
    with pytest.raises(UserError, match="found other instance images.*expected what its trials learned from"):
        tune(dataclasses.replace(config, num_trials=3))
    assert len(trials_of(config)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "between"])
def test_ctrl_c_keeps_all_trials_and_tries_the_stopped_one_again(moment, tune_config, monkeypatch, capsys):
    config = tune_config(num_trials=3)

    def stop(*_):
        if len(trials_of(config)) == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        kind, name = (trial, "measure") if moment == "training" else (search, "_report")
        usual = getattr(kind, name)
        patch.setattr(kind, name, lambda *arguments: [usual(*arguments), stop()][0])
        with pytest.raises(KeyboardInterrupt, match="the same command goes on with them"):
            tune(config)
    assert len(trials_of(config)) == 1 and (Path(config.output_dir) / "best.yaml").is_file()
    study = open_study(Path(config.output_dir))
    stopped = [each for each in study.trials if each.state.name == "FAIL"]
    assert len(stopped) == (moment == "training")
    assert tune(config).trials == 3
    assert all(each.params in [other.params for other in trials_of(config)] for each in stopped)
    assert len(trials_of(config)) == 3


KILLED = """
import os, signal, sys
from atomdiff.cli import main as cli
from atomdiff.training.tuning import trial

usual = trial.measure

def measure(run, step):
    usual(run, step)
    if step == 1 and os.path.isdir(os.path.join(sys.argv[1], "trials", "0001")):
        os.kill(os.getpid(), signal.SIGKILL)

trial.measure = measure
cli.main(["tune", "--config", sys.argv[2]])
"""


def write_options(config, file):
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    file.write_text(json.dumps({field.name: options[field.name] for field in dataclasses.fields(config)}))
    return str(file)


@pytest.mark.slow
def test_a_killed_search_goes_on(tune_config, tmp_path, capsys):
    config = tune_config(num_trials=3)
    file = write_options(config, tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    killed = subprocess.run([sys.executable, "-c", KILLED, config.output_dir, file], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(trials_of(config)) == 1
    (running,) = [each for each in open_study(Path(config.output_dir)).trials if each.state.name == "RUNNING"]
    assert main(["tune", "--config", file]) == 0
    told = capsys.readouterr()
    assert "trials done: 1, to try again: 1" in told.err and "3 trials; the best is" in told.out
    assert running.params in [each.params for each in trials_of(config)] and len(trials_of(config)) == 3


@pytest.mark.slow
def test_several_processes_share_the_trials(tune_config):
    config = tune_config(num_trials=4, num_workers=2)
    found = tune(config)
    assert 4 <= found.trials <= 5 and found.best_file.is_file()
    assert len({str(each.params) for each in trials_of(config)}) == found.trials


def test_worse_trials_are_pruned(tune_config, monkeypatch):
    losses = iter([0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.9, 0.1])

    def measure(run, step):
        line = {"step": step, "validation_loss": next(losses), "base_drift": 0.01}
        run.measurements.values.append(line)

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    config = tune_config({"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}, num_trials=4)
    found = tune(config)
    assert states(config) == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED"]
    assert trials_of(config)[3].intermediate_values == {1: 0.9} and found.best.value == 0.4
    assert "| 3 | pruned |" in (Path(config.output_dir) / "trials.md").read_text().splitlines()[-1]


def test_the_best_trial_is_within_the_limit_of_drift(tune_config, monkeypatch):
    lines = iter([(0.5, 0.05), (0.1, 0.3), (0.4, 0.1)])

    def measure(run, step):
        loss, drift = next(lines)
        run.measurements.values.append({"step": step, "validation_loss": loss, "base_drift": drift})

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    config = tune_config(space, max_train_steps=1, max_base_drift=0.1)
    assert tune(config).best.number == 2
    rows = (Path(config.output_dir) / "trials.md").read_text().splitlines()[-3:]
    assert [row.split(" | ")[0] for row in rows] == ["| 2", "| 0", "| 1"]


def test_a_trial_is_not_pruned_for_its_loss_before_the_trusted_steps(tmp_path):
    study = open_study(tmp_path, trusted_steps=5)
    for _ in range(4):
        good = study.ask()
        for step in (2, 6):
            good.report(0.1, step)
        study.tell(good, 0.1)
    slow, pruned = study.ask(), []
    for step in (2, 6):
        slow.report(0.9, step)
        pruned.append(slow.should_prune())
    assert pruned == [False, True]


def test_a_trial_beyond_the_limit_of_drift_ends_early(tune_config, monkeypatch):
    lines = iter([(0.5, 0.2), (0.6, 0.05), (0.4, 0.09)])

    def measure(run, step):
        loss, drift = next(lines)
        run.measurements.values.append({"step": step, "validation_loss": loss, "base_drift": drift})

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    config = tune_config(space, max_train_steps=2, num_trials=2, max_base_drift=0.1)
    assert tune(config).best.number == 1 and states(config) == ["PRUNED", "COMPLETE"]


def test_without_a_trial_within_the_limit_there_is_no_best(tune_config):
    config = tune_config(num_trials=2, max_base_drift=1e-9)
    found = tune(config)
    assert found.best is None and not (Path(config.output_dir) / "best.yaml").exists()
    assert "2 trials, none complete with a base drift within the limit: raise --max_base_drift" in found.describe()


def test_keep_best_takes_the_lowest_loss_of_a_trial(tune_config, monkeypatch):
    losses = iter([0.5, 0.2, 0.6, 0.7])

    def measure(run, step):
        run.measurements.values.append({"step": step, "validation_loss": next(losses), "base_drift": step / 100})

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    fields = {"num_trials": 1, "max_train_steps": 4, "validation_split": 0.3, "max_base_drift": 0.025}
    fields["validation_loss_steps"] = None  # chosen by the search
    found = tune(tune_config(space, keep_best=True, **fields))
    assert found.best.value == 0.2 and found.best.user_attrs["step"] == 2
    assert found.best.user_attrs["base_drift"] == 0.02
    best = yaml.safe_load(found.best_file.read_text())
    assert best["keep_best"] is True and best["validation_loss_steps"] == 1  # as in the trials


def test_a_best_step_is_one_after_layers_have_left_for_the_budget(tune_config, monkeypatch, tmp_path):
    losses = iter([0.1, 0.5, 0.4, 0.7])

    def measure(run, step):
        run.measurements.values.append({"step": step, "validation_loss": next(losses), "base_drift": 0.0})

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    (tmp_path / "budget.json").write_text('{"peft_type": "ATOMS", "select": "adaptive", "select_budget": "30KB"}')
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    fields = {"num_trials": 1, "max_train_steps": 4, "validation_split": 0.3, "keep_best": True}
    found = tune(tune_config(space, adapter=str(tmp_path / "budget.json"), validation_loss_steps=None, **fields))
    assert found.best.value == 0.4 and found.best.user_attrs["step"] == 3


def test_no_trial_is_pruned_by_what_was_measured_before_layers_have_left_for_the_budget(
    tune_config, monkeypatch, tmp_path
):
    better = [(0.5, 0.0), (0.4, 0.0), (0.4, 0.0), (0.4, 0.0)]
    late = [(0.9, 0.3), (0.3, 0.0), (0.3, 0.0), (0.3, 0.0)]  # loss and drift of a first step that does not count
    early = [(0.1, 0.0), (0.9, 0.0)]
    far = [(0.1, 0.0), (0.3, 0.2)]
    lines = iter([*better, *better, *better, *late, *early, *far])

    def measure(run, step):
        loss, drift = next(lines)
        run.measurements.values.append({"step": step, "validation_loss": loss, "base_drift": drift})

    monkeypatch.setattr(trial, "measure", measure)
    monkeypatch.setattr(trial, "start_measuring", lambda *_: None)
    (tmp_path / "budget.json").write_text('{"peft_type": "ATOMS", "select": "adaptive", "select_budget": "30KB"}')
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    config = tune_config(
        space, num_trials=6, max_train_steps=4, max_base_drift=0.1, adapter=str(tmp_path / "budget.json")
    )
    assert tune(config).best.number == 3
    assert states(config) == ["COMPLETE"] * 4 + ["PRUNED"] * 2 and next(lines, None) is None
    assert [*trials_of(config)[3].intermediate_values] == [2, 3, 4]
    assert trials_of(config)[4].intermediate_values == {2: 0.9}


def test_a_trial_that_diverges_counts_as_a_bad_one(tune_config, monkeypatch, capsys):
    usual, calls = trial.train_step, []

    def diverge(run, step):
        calls.append(step)
        if len(calls) == 4:
            raise DivergedError(step, "the loss is nan", "lower the learning rate", ["a.png"])
        return usual(run, step)

    monkeypatch.setattr(trial, "train_step", diverge)
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    config = tune_config(space, num_trials=2)
    assert tune(config).best.number == 0
    assert states(config) == ["COMPLETE", "PRUNED"] and "trial 1: diverged" in capsys.readouterr().err


def test_failures_are_noted_but_the_first_one_ends_the_search(tune_config, monkeypatch):
    config = tune_config(num_trials=3)

    def fail(*_):
        raise UserError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(search, "run_trial", fail)
        with pytest.raises(UserError, match="too large"):
            tune(config)
    assert trials_of(config) == []
    tune(dataclasses.replace(config, num_trials=1))
    with monkeypatch.context() as patch:
        patch.setattr(search, "run_trial", fail)
        assert tune(config).trials == 3
    assert states(config) == ["COMPLETE", "FAIL", "FAIL"]
    assert trials_of(config)[1].user_attrs["reason"] == "too large"


def test_a_missing_optuna_is_told(tune_config, monkeypatch, tmp_path, capsys):
    from atomdiff.training import launch

    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "optuna" else object())
    assert main(["tune", "--config", write_options(tune_config(), tmp_path / "run.yaml")]) == 2
    assert 'optuna is missing; pip install "atomdiff[tune]"' in capsys.readouterr().err
