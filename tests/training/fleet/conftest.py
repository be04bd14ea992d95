"""Fixtures of the tests of fleets."""

import dataclasses

import pytest

from atomdiff.training.config.fleet import FleetConfig
from atomdiff.training.fleet import fleet
from atomdiff.training.fleet.workers import SubjectTrainer
from tests.helpers import write_images


class SameProcessPool:
    """Workers that are this process: each trains when it is waited for."""

    def __init__(self, runs, num_workers, logs):
        self.runs, self.trainers, self.events, self.assigned = runs, {}, [], []

    def start(self, worker):
        self.trainers[worker] = SubjectTrainer(next(iter(self.runs.values())), worker)
        self.events.append(self.trainers[worker].ready())

    def assign(self, worker, name):
        self.assigned.append((worker, name))

    def wait(self, seconds):
        events, self.events = self.events, []
        if self.assigned:
            worker, name = self.assigned.pop(0)
            events.append(self.trainers[worker].train(self.runs[name]))
        return events

    def close(self):
        self.trainers.clear()


@pytest.fixture
def same_process(monkeypatch):
    """Fleets are trained by this process."""
    monkeypatch.setattr(fleet, "ProcessPool", SameProcessPool)


@pytest.fixture
def run_values(train_config):
    """The values of a short run on the tiny pipeline, by field, that all subjects share."""

    def make(**fields):
        run = train_config(instance_data_dir="images", **fields)
        return {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}

    return make


@pytest.fixture
def table(tmp_path):
    """Writes a table of subjects with images, each line a name and what follows its folder; returns its path."""

    def write(*lines, columns=""):
        rows = []
        for number, line in enumerate(lines):
            name, comma, cells = line.partition(",")
            folder = tmp_path / "images" / name
            if not folder.exists():
                write_images(folder, seed=number)
            rows.append(f"{name},{folder}{comma}{cells}\n")
        file = tmp_path / "subjects.csv"
        file.write_text(f"name,instance_data_dir{columns}\n{''.join(rows)}")
        return file

    return write


@pytest.fixture
def fleet_config(tmp_path):
    """Makes the config of a fleet of one worker."""

    def make(file, **fields):
        usual = {"output_dir": str(tmp_path / "fleet"), "num_workers": 1}
        return FleetConfig(**{**usual, **fields, "subjects": str(file)})

    return make
