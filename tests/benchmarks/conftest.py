"""A small world for trials, comparisons and sheets: photos, protocols and a run of two steps on the tiny base."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks.trial_runner import Runner
from benchmarks.trials import Trial, run_trial
from tests.helpers import write_images

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-sd"
ADAPTER_FIELDS = {"peft_type": "ATOMS", "target_modules": "conv", "channel_block": 1}
PLACES = """
images_per_prompt: 2
prompts:
  in span: &prompts
    - {prompt: "a photo of {subject} in the snow", scene: snow}
    - {prompt: "a photo of {subject} on the beach", scene: beach}
  hard: *prompts
prior_prompts: ["a photo of {subject}"]
unrelated_prompts: [a photo of a cat]
"""
SUBJECTS = {"mug": {"class_name": "mug", "prompts": "in span"}, "robot": {"class_name": "robot", "prompts": "hard"}}
EDITS = {"images_per_prompt": 1, "prompts": [{"prompt": "a red {subject}", "color": "red"}]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Photos of two subjects and one to tune on, protocols, and a run of two steps; trials run in this process."""
    for number, (folder, name) in enumerate([("subjects", "mug"), ("subjects", "robot"), ("tuning", "cat")]):
        write_images(tmp_path / folder / name, (32, 32), seed=number)
        write_images(tmp_path / folder / name / "unseen", (32, 32), seed=10 + number)
    tuning = {"subjects": {"cat": {"class_name": "cat", "prompts": "hard"}}}
    run = {"pretrained_model_name_or_path": str(TINY), "train_token": True, "token_learning_rate": 0.02}
    run |= {"train_batch_size": 1, "max_train_steps": 2, "logging_steps": 1, "num_inference_steps": 1}
    files = {"places": PLACES + yaml.safe_dump({"subjects": SUBJECTS}), "tuning": PLACES + yaml.safe_dump(tuning)}
    files |= {"edits": yaml.safe_dump(EDITS), "run": yaml.safe_dump(run)}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(Runner, "_start", lambda self, folder: started.append(folder) or run_trial(folder))
    started = []
    return SimpleNamespace(path=tmp_path, started=started)


@pytest.fixture
def trial(world):
    path = world.path
    return Trial(
        str(path / "trial"),
        str(path / "subjects" / "mug"),
        ADAPTER_FIELDS,
        {"learning_rate": 0.01, "seed": 3},
        (str(path / "places.yaml"), str(path / "edits.yaml")),
        str(path / "run.yaml"),
        str(path / "shared"),
    )
