"""Classifiers that choose their layers within `select_budget`: what is written, when layers leave, what is refused."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from atomdiff.classify import train as training
from atomdiff.classify.model import open_base
from atomdiff.classify.saving import load_classifier
from atomdiff.classify.train import train_classifier
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.tuner.selection import layer_scores
from atomdiff.utils.errors import UserError

BUDGET = 2500  # of about 4 KB with all layers
ADAPTER = {"peft_type": "ATOMS", "select": "adaptive", "select_penalty": 0.0, "channel_block": 2, "basis": "dct"}
SCHEDULE_FREE = {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "batch_norm": "frozen"}


@pytest.fixture
def chosen(config, tmp_path):
    """A run of eight steps whose adapter has this budget."""

    def make(budget=BUDGET, **fields):
        (tmp_path / "adapter.json").write_text(json.dumps(ADAPTER | {"select_budget": budget}))
        usual = {"adapter": str(tmp_path / "adapter.json"), "max_train_steps": 8, "learning_rate": 0.01}
        return dataclasses.replace(config, **usual | fields)

    return make


@pytest.fixture
def acting(monkeypatch):
    """Collects which layers a run has after each step: those that were not left out."""
    found, usual = {}, training.keep_to_budget

    def keep(run, step):
        usual(run, step)
        scores = layer_scores(run.model, "default")
        found[step] = {score.path for score in scores if score.parameter.item() != 0}

    monkeypatch.setattr(training, "keep_to_budget", keep)
    return found


def adapter_size(config):
    return sum(file.stat().st_size for file in (Path(config.output_dir) / "classifier").glob("adapter_*"))


@pytest.mark.parametrize("options", [{}, SCHEDULE_FREE], ids=str)
def test_the_files_of_the_adapter_stay_within_the_budget(chosen, options, acting, trained, logits):
    config = chosen(**options)
    report = train_classifier(config)
    total = len(atom_layers(trained[0]))
    assert [len(acting[step]) for step in (1, 2, 3)] == [total] * 3
    assert acting[4] == acting[8] and 0 < len(acting[4]) < total
    loaded = load_classifier(Path(config.output_dir) / "classifier")
    assert atom_layers(loaded).keys() == acting[4] and torch.equal(logits(loaded), logits(trained[0]))
    assert report["selected_layers"].startswith(f"{len(acting[4])} of {total}: resnet.")
    assert adapter_size(config) <= BUDGET
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        PeftModel.from_pretrained(
            open_base(config.pretrained_model_name_or_path), Path(config.output_dir, "classifier")
        )


def test_with_room_for_all_every_layer_stays(chosen, acting):
    config = chosen("100KB")
    report = train_classifier(config)
    total = len(acting[8])
    assert report["selected_layers"].startswith(f"{total} of {total}: ") and BUDGET < adapter_size(config)


def test_layers_that_are_left_out_are_not_trained_and_the_others_are(chosen, monkeypatch):
    scores, usual = {}, training.keep_to_budget

    def keep(run, step):
        usual(run, step)
        scores[step] = {score.path: score.parameter.item() for score in layer_scores(run.model, "default")}

    monkeypatch.setattr(training, "keep_to_budget", keep)
    train_classifier(chosen())
    left = {path for path, value in scores[4].items() if value == 0}
    assert left and all(scores[8][path] == 0 for path in left)
    assert any(scores[8][path] != scores[4][path] for path in scores[4].keys() - left)


def test_the_best_weights_are_of_the_layers_that_are_saved(chosen, monkeypatch, acting, trained):
    found = iter([0.9, 0.8, 0.7, 0.4, 0.6, 0.5])  # validations of steps 2, 4, 6 and 8, then the report
    usual = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *each: usual(*each) | {"accuracy": next(found, 0.5)})
    report = train_classifier(chosen(early_stopping_patience=5))
    assert report["best_step"] == 4 and [each["step"] for each in report["validations"]] == [2, 4, 6, 8]
    left = [score.parameter.item() for score in layer_scores(trained[0], "default") if score.path not in acting[4]]
    assert left and not any(left)


def test_a_run_is_not_stopped_before_layers_have_left(chosen, monkeypatch, acting):
    monkeypatch.setattr(training, "evaluate", lambda *_: {"accuracy": 0.5, "loss": 1.0})
    config = chosen(early_stopping_patience=1, validation_steps=1)
    report = train_classifier(config)
    assert report["best_step"] == 4 and max(acting) == 5 and adapter_size(config) <= BUDGET


def test_a_budget_without_room_is_refused_before_the_first_step(chosen, acting):
    config = chosen("800")
    with pytest.raises(UserError, match=r"select_budget=800 bytes: the adapter's files have \d+ without any layer"):
        train_classifier(config)
    assert not acting and not (Path(config.output_dir) / "classifier").exists()
