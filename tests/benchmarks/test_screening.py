"""The screening in miniature, on the tiny base."""

import dataclasses
import json

import pytest

from atomdiff.utils.errors import UserError
from benchmarks import screening
from benchmarks.experiments import read_adapter_fields
from benchmarks.screening_changes import Change
from benchmarks.trials import Trial


@pytest.mark.slow
def test_changes_are_screened_beside_their_predictions(world, monkeypatch, capsys):
    changes = {"none": Change("the same", 0.0, 0.0), "broken": Change("fails", 0.1, 0.1, adapter={"num_atoms": -1})}
    changes["one step"] = Change("half of it", -0.5, -0.01, {"max_train_steps": 1})
    monkeypatch.setitem(screening.TABLES, "adapter", ("atoms/conv", changes))
    path = world.path
    config = screening.ScreeningConfig(
        "adapter",
        trials=2,
        max_drift=1.0,
        run=str(path / "run.yaml"),
        tuning_dir=str(path / "tuning"),
        protocol=str(path / "tuning.yaml"),
        work_dir=str(path / "work"),
        output=str(path / "screening.json"),
    )
    screening.main(config)
    result = json.loads((path / "screening.json").read_text())
    found = result["changes"]
    assert [*found] == ["baseline", *changes] and result["baseline"] == "atoms/conv"
    assert result["command"].startswith("python -m benchmarks.screening --table adapter --trials 2")
    assert found["none"]["differences"]["gain"]["mean"] == 0 == found["none"]["differences"]["drift"]["mean"]
    assert "num_atoms=-1" in found["broken"]["failed"][0]["message"]
    assert found["one step"]["predicted"] == {"gain": -0.5, "drift": -0.01, "why": "half of it"}
    assert found["one step"]["differences"]["drift"]["mean"] < 0 and found["one step"]["options"] == {
        "max_train_steps": 1
    }
    searched = found["none"]["search"]
    assert searched == found["baseline"]["search"] and [*searched] == ["0.005", "0.015"]
    best = searched[f"{found['none']['learning_rate']:g}"]
    assert best == {name: each["mean"] for name, each in found["none"]["figures"].items()}
    assert best["gain"] == max(each["gain"] for each in searched.values())
    assert found["broken"]["search"] == {"0.005": {}, "0.00167": {}}
    table = capsys.readouterr().out
    assert "| one step | -0.500 | " in table and "| broken | failed: " in table
    started = len(world.started)
    screening.main(config)
    assert len(world.started) == started == 4 * 2
    written = set()
    monkeypatch.setattr(screening, "write_result", lambda file, *_, **__: written.add(file))
    screening.main(dataclasses.replace(config, output=None))
    assert written == {"benchmarks/results/screening_adapter.json"}
    with pytest.raises(UserError, match="changes: found 'more'; expected some of none, broken, one step"):
        screening.main(dataclasses.replace(config, changes=("more",)))


@pytest.mark.parametrize("table", screening.TABLES)
def test_every_change_can_be_trained(table, world):
    method, changes = screening.TABLES[table]
    from atomdiff.tuner.read_config import read_adapter

    for name, change in changes.items():
        folder = world.path / "changes" / name
        folder.mkdir(parents=True)
        fields = {**read_adapter_fields(method), **change.adapter}
        (folder / "adapter.json").write_text(json.dumps(fields))
        adapter = read_adapter(str(folder / "adapter.json"))
        photos = str(world.path / "subjects" / "mug")
        run = Trial(str(folder), photos, fields, {"learning_rate": 0.1, **change.options}, (), "configs/demo.yaml")
        config = run.config()
        for option, value in change.options.items():
            assert getattr(config, option) == value != getattr(dataclasses.replace(run, options={}).config(), option)
        assert all(getattr(adapter, field) == value for field, value in change.adapter.items())
        assert change.why and (change.options or change.adapter or change.rate != 1)
    assert len(changes) >= 10


def test_layers_are_added_to_those_of_the_baseline():
    method, changes = screening.TABLES["layers"]
    own = read_adapter_fields(method)["target_modules"]
    targets = {change.adapter["target_modules"].removeprefix(f"{own}|") for change in changes.values()}
    assert "all" in targets and not any("conv_out" in each for each in targets)
