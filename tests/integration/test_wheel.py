"""The built wheel in an empty folder: what the demo needs travels with it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from atomdiff.evaluate.protocol import load_protocol

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the contents of the wheel."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    kept = shutil.ignore_patterns("__pycache__", "results", "*.pyc")
    for name in ("atomdiff", "configs", "samples"):
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run = subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 55e6
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


def test_all_modules_and_assets_are_in_it(site):
    modules = {path.relative_to(ROOT) for path in (ROOT / "atomdiff").rglob("*.py")}
    assert modules == {path.relative_to(site) for path in (site / "atomdiff").rglob("*.py")}
    assert (site / "atomdiff" / "py.typed").is_file() == (ROOT / "atomdiff" / "py.typed").is_file()
    assert not {path.name for path in site.iterdir()} - {"atomdiff"} - {path.name for path in site.glob("*.dist-info")}
    assert (site / "atomdiff" / "ui" / "page.css").is_file()
    samples = site / "atomdiff" / "_assets" / "samples"
    assert (samples / "toybox-sd" / "model_index.json").is_file()
    for folder, protocol in (("subjects", "toybox"), ("tuning_subjects", "toybox_tuning")):
        assert {path.name for path in (samples / folder).iterdir()} >= {*load_protocol(protocol).subjects}


def test_the_demo_runs_in_an_empty_folder(site, tmp_path):
    run = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    run |= {"max_train_steps": 1, "num_inference_steps": 2, "lr_warmup_steps": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "atomdiff", "demo", "--run", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (empty / "out" / "demo").iterdir()} > {"mug.atoms.safetensors", "before_after.png"}
    assert f"from_pretrained('{site}/atomdiff/_assets/samples/toybox-sd')" in done.stdout
