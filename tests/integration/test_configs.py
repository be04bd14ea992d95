import re
from pathlib import Path

import pytest

from atomdiff.training.dreambooth import load_config
from atomdiff.tuner.read_config import read_adapter

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted((ROOT / "configs" / "experiments").rglob("adapter.json"))
RUNS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs_to_load():
    assert len(ADAPTERS) >= 5 and RUNS
    known = {*ADAPTERS, *RUNS, *(path.with_name("overrides.yaml") for path in ADAPTERS)}
    assert known == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_run_loads(path):
    config = load_config(["--config", str(path), "--instance_data_dir", "photos", "--class_name", "mug"])
    read_adapter(config.adapter)
    base = config.pretrained_model_name_or_path
    assert (ROOT / base).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith("samples")


@pytest.mark.slow
@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: str(path.parent.relative_to(ROOT / "configs")))
def test_every_adapter_loads_with_its_own_learning_rate(path):
    adapter = read_adapter(str(path))
    assert adapter is None or adapter.target_modules
    arguments = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "photos", "--class_name", "mug"]
    config = load_config([*arguments, "--adapter", str(path)])
    assert f"{config.learning_rate:g}" in {f"{float(rate):g}" for rate in _rates(path)}


def _rates(path):
    lines = path.with_name("overrides.yaml").read_text().splitlines()
    return [line.split(":")[1].split("#")[0] for line in lines if line.startswith("learning_rate:")]
