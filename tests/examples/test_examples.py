"""The scripts of examples/, in miniature, and the notebook."""

import runpy
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "tests" / "fixtures" / "tiny-sd")
CONCEPT = ROOT / "tests" / "fixtures" / "robot.atoms.safetensors"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A script of examples/ with options, in an empty folder -> what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_mixed_batch(run):
    assert "3 images" in run("mixed_batch.py", BASE, CONCEPT, CONCEPT, "--steps", 1)
    assert Image.open("mixed.png").size == (3 * 32, 32)


def test_export(run):
    printed = run("export.py", BASE, CONCEPT, "--rank", 4)
    assert "relative error" in printed and "the word sks" in printed
    assert any(key.endswith(".lora_up.weight") for key in load_file("out/export/robot-lora.safetensors"))
    assert any(key.endswith(".diff") for key in load_file("out/export/robot-diff.safetensors"))


@pytest.mark.slow
def test_library(run):
    for name in ("a.atoms.safetensors", "more/b.atoms.safetensors"):
        Path("concepts", name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONCEPT, Path("concepts", name))
    assert "2 of 2 concepts" in run("library.py", BASE, "concepts", "--find", "robot", "--steps", 1)
    assert {file.name for file in Path("out/library").rglob("*.png")} == {"a.png", "b.png"}


def test_classifier_patches(run):
    printed = run("classifier_patches.py", "--images", 4, "--steps", 1)
    assert "in one batch: classes" in printed and "the base is as it was: True" in printed


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOMDIFF_NOTEBOOK_STEPS", "2")
    for name in ("samples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(ROOT / "examples" / "toybox.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "out" / "notebook" / "robot.atoms.safetensors").is_file()
