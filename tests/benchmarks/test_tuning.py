"""What was found is compared with the default, subject by subject and seed by seed."""

import json
from pathlib import Path

import pytest
import yaml

from atomdiff.cli import demo
from benchmarks import tuning

LOSSES = {("default", "cat"): 0.2, ("default", "robot"): 0.4, ("found", "cat"): 0.19, ("found", "robot"): 0.42}


@pytest.fixture
def demos(monkeypatch):
    """The demos that were asked for; each has the loss of its setting and subject, and a hundredth more with seed 1."""
    asked = []

    def run_demo(config):
        asked.append(config)
        settings = yaml.safe_load(Path(config.run).read_text())
        loss = LOSSES["found" if "learning_rate" in settings else "default", config.class_name] + settings["seed"] / 100
        lines = [{"step": step, "validation_loss": each, "base_drift": 0.05} for step, each in ((0, 0.5), (300, loss))]
        folder = Path(config.output_dir)
        (folder / "validation_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        report = {"similarity": {"concept": 1 - loss, "normalized_gain": 0.5}, "scene_accuracy": {"concept": 1.0}}
        report |= {"drift": 0.1, "file_bytes": 9, "train_seconds": 1.0}
        (folder / "report.json").write_text(json.dumps(report))

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return asked


def test_the_best_within_each_limit_is_compared_with_the_default(demos, tmp_path, monkeypatch):
    folder = tmp_path / "work" / "search" / "trials" / "0002"
    folder.mkdir(parents=True)
    (folder / "adapter-1.json").write_text("{}")
    rows = [("0", "complete", 0.2, 0.12), ("1", "pruned", 0.1, 0.05), ("2", "complete", 0.25, 0.08)]
    names = ("trial", "state", "validation_loss", "base_drift")
    trials = [{**dict(zip(names, map(str, row), strict=True)), "learning_rate": "0.002"} for row in rows]
    monkeypatch.setattr(tuning, "search", lambda _: trials)
    config = tuning.BenchmarkConfig(seeds=(0, 1), work_dir=str(tmp_path / "work"), output=str(tmp_path / "tuning.json"))
    tuning.main(config)
    result = json.loads((tmp_path / "tuning.json").read_text())
    figures = result["figures"]
    assert result["settings"] == {"default": "default", "within_0.14": "default", "within_0.1": "trial-2"}
    assert len(demos) == 8 and {Path(each.instance_data_dir).name for each in demos} == {"robot", "cat"}
    assert figures["default:cat:validation_loss"] == 0.205
    assert figures["within_0.1:robot:validation_loss"] == pytest.approx(0.425)
    assert figures["within_0.1:validation_loss_difference"] == pytest.approx(0.005)
    assert figures["within_0.14:similarity_difference"] == 0
    assert [run["validation_loss"] for run in result["runs"]["within_0.1"]["robot"]] == [0.42, 0.43]
    asked = yaml.safe_load(Path(demos[1].run).read_text())
    assert asked["adapter"] == str(folder / "adapter-1.json") and asked["token_learning_rate"] == 0.02
    tuning.main(config)  # finished runs are not repeated
    assert len(demos) == 8
    trials[2]["learning_rate"] = "0.003"  # another setting
    tuning.main(config)
    assert len(demos) == 12
