"""Fixtures of the tests of searches."""

import dataclasses

import pytest
import yaml

from atomdiff.training.config.tune import TuneConfig

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "max_train_steps": {"low": 2, "high": 4},
    "adapter.channel_block": [1, 2],
}


@pytest.fixture
def space_file(tmp_path):
    """Writes a search space and returns its path."""

    def write(space):
        file = tmp_path / "space.yaml"
        file.write_text(yaml.safe_dump(space, sort_keys=False))
        return str(file)

    return write


@pytest.fixture
def tune_config(train_config, space_file, tmp_path):
    """Makes the config of a search of a few short runs, by default in `SPACE`."""

    def make(space=None, **fields):
        usual = {"max_train_steps": 2, "validation_loss_steps": 1, "output_dir": str(tmp_path / "tune")}
        own = {field.name for field in dataclasses.fields(TuneConfig)} - {"output_dir"}
        own -= {field.name for field in dataclasses.fields(type(train_config()))}
        searching = {"num_trials": 3, "max_base_drift": None, **{k: v for k, v in fields.items() if k in own}}
        run = train_config(**usual | {name: value for name, value in fields.items() if name not in own})
        options = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
        return TuneConfig(**options, search_space=space_file(space or SPACE), **searching)

    return make
