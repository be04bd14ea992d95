import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_dreambooth.py"

pytestmark = pytest.mark.slow  # processes that import torch


@pytest.fixture
def command(tmp_path, tiny_pipe_folder):
    (tmp_path / "photos").mkdir()
    Image.radial_gradient("L").save(tmp_path / "photos" / "one.png")
    fields = {
        "pretrained_model_name_or_path": tiny_pipe_folder,
        "instance_data_dir": tmp_path / "photos",
        "output_dir": tmp_path / "out",
        "class_name": "mug",
        "max_train_steps": 1,
    }
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def test_the_script_trains(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    concept = tmp_path / "out" / "photos.atoms.safetensors"
    assert concept.is_file()
    assert capsys.readouterr().out == f"saved {concept}\n"


def test_a_mistake_is_one_line_without_a_traceback(command, tmp_path):
    (tmp_path / "photos" / "two.png").write_text("no picture")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (2, "")
    why = "(no png nor any other image that Pillow knows). Replace or remove them"
    found = f"{tmp_path / 'photos'}: cannot be read: two.png {why}"
    assert run.stderr == f"atomdiff train: error: {found}\n"


def test_two_processes_share_one_run(command, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    options = ["--logging_steps", "1", "--mixed_precision", "no", "--report_to", "null"]
    run = subprocess.run([*launch, *command, *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("saved") == 1
    assert len((tmp_path / "out" / "training_log.jsonl").read_text().splitlines()) == 1


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80
