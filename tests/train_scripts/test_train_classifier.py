import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_classifier.py"

pytestmark = pytest.mark.slow  # processes that import torch


@pytest.fixture
def command(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("L", (16, 16), 150 * number + 10 * index).save(tmp_path / "pictures" / name / f"{index}.png")
    fields = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "train_data_dir": tmp_path / "pictures",
        "output_dir": tmp_path / "out",
        "resolution": 16,
        "max_train_steps": 2,
        "train_batch_size": 2,
    }
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def test_the_script_trains_and_says_nothing_else(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shown = ", ".join(f"{split} {report['accuracy'][split]:.3f}" for split in ("train", "validation", "test"))
    assert capsys.readouterr().out == f"saved {tmp_path / 'out'}/classifier; accuracy: {shown}\n"


def test_two_processes_share_one_run_and_its_evaluation(command, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    options = ["--mixed_precision", "no", "--validation_share", "0.2", "--test_share", "0.2", "--adapter", "full"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*launch, *command, *options], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("saved") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"] == {"train": 6, "validation": 2, "test": 2}
    assert all(accuracy * report["images"][split] % 1 == 0 for split, accuracy in report["accuracy"].items())


def test_a_mistake_is_one_line_without_a_traceback(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures" / "dark" / "two.png").write_text("no picture")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    why = "(no png nor any other image that Pillow knows). Replace or remove them"
    shown = capsys.readouterr()
    assert shown.out == ""
    precision, found = shown.err.splitlines()
    assert precision.startswith("precision: ")
    assert found == f"atomdiff classify: error: {tmp_path / 'pictures'}: cannot be read: dark/two.png {why}"
