import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from atomdiff.cli import main
from atomdiff.demo import DemoConfig, run_demo
from atomdiff.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The demo's run with as few steps as there can be, started from the project's root."""
    monkeypatch.chdir(ROOT)
    run = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    run |= {"max_train_steps": 2, "num_class_images": 2, "num_inference_steps": 2, "lr_warmup_steps": 1}
    run |= {"logging_steps": 1, "class_data_dir": str(tmp_path / "class")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_the_demo_leaves_everything_it_promises(quick, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--run", str(quick), "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    concept = output / "mug.atoms.safetensors"
    for path in (concept, output / "before_after.png", output / "training_curve.png", output / "report.json"):
        assert str(path) in printed and path.is_file()
    assert f'atomdiff.load_atoms(pipe, "{concept}")' in printed
    report = json.loads((output / "report.json").read_text())
    assert report["subject"] == "mug" and report["references"] == "unseen photos"
    assert report["file_bytes"] == concept.stat().st_size < 64_000
    assert {"base", "concept", "real"} <= report["similarity"].keys()
    assert report["similarity"]["base"] < 0.6 < report["similarity"]["real"]
    assert report["scene_accuracy"].keys() == {"base", "concept"}
    assert 0 < report["trained_numbers"] < 40_000 and report["total_seconds"] > report["train_seconds"] > 0
    assert Image.open(output / "before_after.png").width > 800


def test_any_method_objective_and_folder_go_the_same_way(quick, tmp_path):
    quick.write_text(
        f"{quick.read_text()}rescale_betas_zero_snr: false\n"
    )  # loading would warn of the base's scheduler
    photos = tmp_path / "my-photos"
    photos.mkdir()
    for path in sorted((ROOT / "samples" / "subjects" / "robot").glob("*.png"))[:3]:
        (photos / path.name).write_bytes(path.read_bytes())
    adapter = ROOT / "configs" / "experiments" / "lora" / "attention_r16" / "adapter.json"
    config = DemoConfig(
        str(photos), class_name="robot", run=str(quick), adapter=str(adapter), output_dir=str(tmp_path / "lora")
    )
    report = run_demo(config)
    assert report["subject"] == "my-photos" and report["references"] == "training photos"
    assert report["trained_numbers"] > 250_000


def test_a_missing_folder_is_one_clear_line(capsys):
    with pytest.raises(UserError, match="instance_data_dir='nowhere'"):
        DemoConfig("nowhere")
    assert main(["demo", "--instance_data_dir", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
