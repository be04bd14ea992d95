"""How far two environments are apart is measured by losses, parameters, files and images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from atomdiff.utils.errors import UserError
from benchmarks import reproducibility

CONCEPT = Path(__file__).parents[1] / "fixtures" / "robot.atoms.safetensors"


def write(folder, losses, parameter, color):
    (folder / "images").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "training_log.jsonl").write_text("\n".join(lines))
    (folder / "checkpoint-2").mkdir()
    torch.save({"parameters": {"S": torch.tensor(parameter)}}, folder / "checkpoint-2" / "state.pt")
    shutil.copy(CONCEPT, folder / "robot.atoms.safetensors")
    Image.new("RGB", (2, 2), (color, 0, 0)).save(folder / "images" / "a.png")
    manifest = {"images": [{"file": "a.png", "prompt": "a robot", "seed": 0}]}
    (folder / "images" / "manifest.json").write_text(json.dumps(manifest))


def test_environments_are_compared(tmp_path):
    config = reproducibility.BenchmarkConfig(steps=2)
    write(tmp_path / "one", [1.0, 2.0], [3.0, -4.0], 10)
    write(tmp_path / "two", [1.0, 2.5], [3.0, -4.2], 13)
    same = reproducibility.compare(config, tmp_path / "one", tmp_path / "one")
    assert same["first_step_apart"] is None and same["parameters_equal"] and same["images_equal"]
    found = reproducibility.compare(config, tmp_path / "one", tmp_path / "two")
    assert found["first_step_apart"] == 2 and found["loss_last_step"] == pytest.approx(0.25)
    assert found["parameters_relative"] == pytest.approx(0.05) and found["norm_apart"] == pytest.approx(0.04)
    assert 0 < found["one_minus_cosine"] < 1e-3
    assert found["images_mean_apart"] == 1 and found["images_largest_apart"] == 3 and found["concept_file_equal"]
    with pytest.raises(UserError, match="found 2 and 2 steps; expected 3 in both"):
        reproducibility.compare(reproducibility.BenchmarkConfig(steps=3), tmp_path / "one", tmp_path / "two")


def test_environments_are_compared_with_those_of_another_machine(tmp_path, monkeypatch):
    seen = []

    def run(config, folder, variables):
        seen.append(variables)
        older = "ATEN_CPU_CAPABILITY" in variables
        write(folder, [1.0, 2.0 + older / 8], [3.0, -4.0 - older], 10 + older)

    monkeypatch.setattr(reproducibility, "run", run)
    shared = {"steps": 2, "output": str(tmp_path / "result.json")}
    older = {"work_dir": str(tmp_path / "older"), "environments": ("usual", "2 threads"), "processor": "oldest"}
    reproducibility.main(reproducibility.BenchmarkConfig(**shared, **older))
    assert seen[0] == reproducibility.ONE_THREAD | reproducibility.OLDEST and seen[1]["OMP_NUM_THREADS"] == "2"

    own = {"work_dir": str(tmp_path / "own"), "environments": ("usual",)}
    config = reproducibility.BenchmarkConfig(**shared, **own, compare=str(tmp_path / "older"))
    reproducibility.main(config)
    result = json.loads((tmp_path / "result.json").read_text())
    (name,) = result["figures"]
    apart = result["figures"][name]
    assert name == "usual / usual, elsewhere" and result["elsewhere"]["processor"] == "oldest"
    assert apart["first_step_apart"] == 2 and apart["loss_last_step"] == 0.0625 and apart["images_largest_apart"] == 1
    assert apart["parameters_relative"] == 0.25 and result["environments"]["usual"] == reproducibility.ONE_THREAD
    assert result["command"] == "python -m benchmarks.reproducibility --steps 2 --environments usual"
    shutil.rmtree(tmp_path / "older" / "usual")
    with pytest.raises(UserError, match=r"compare=.*: expected machine.json and a folder of one of usual; copy"):
        reproducibility.main(config)
