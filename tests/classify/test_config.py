import json

import pytest

from atomdiff.classify.config import ClassifyConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_with_overrides

NEEDED = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "images"]


def test_an_adapter_brings_its_learning_rate_and_the_command_line_wins(tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS"}))
    (tmp_path / "overrides.yaml").write_text("learning_rate: 0.25\n")
    arguments = [*NEEDED, "--adapter", str(tmp_path / "adapter.json")]
    assert parse_with_overrides(ClassifyConfig, arguments).learning_rate == 0.25
    assert parse_with_overrides(ClassifyConfig, [*arguments, "--learning_rate", "0.5"]).learning_rate == 0.5


def test_a_stray_overrides_file_does_nothing(tmp_path, monkeypatch):
    (tmp_path / "overrides.yaml").write_text("learning_rate: 0.25\n")
    monkeypatch.chdir(tmp_path)
    assert parse_with_overrides(ClassifyConfig, NEEDED).learning_rate is None


def test_the_snapshot_has_the_learning_rates_that_are_used():
    snapshot = ClassifyConfig(pretrained_model_name_or_path="base", train_data_dir="images").snapshot()
    assert (snapshot["learning_rate"], snapshot["head_learning_rate"]) == (5e-3, 3e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps=0: expected a number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a number of at least 0"),
        ({"random_resized_crop": 1.5}, "random_resized_crop=1.5: expected a number of at least 0.01 and at most 1"),
        ({"validation_share": 0.0}, "validation_share=0.0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "test_share=0.5: expected a sum below 1"),
        ({"lr_scheduler": "step"}, "lr_scheduler='step': expected one of constant"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "constant"}, "schedulefree': expected batch_norm frozen"),
        ({"optimizer": "prodigy", "head_learning_rate": 3e-3}, "found the learning rates adapter 1, head 0.003"),
        ({"batch_norm": "on"}, "batch_norm='on': expected one of frozen, updated or none"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8': expected one of no, fp16, bf16 or none"),
    ],
)
def test_values_that_cannot_be_used_are_user_errors(fields, message):
    with pytest.raises(UserError, match=message):
        ClassifyConfig(pretrained_model_name_or_path="base", train_data_dir="images", **fields)
