import dataclasses
import json
import math

import pytest
import yaml

from atomdiff.errors import UserError
from atomdiff.train_config import TrainConfig, load_config

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "class_name": "mug"}
COMMAND = [word for name, value in NEEDED.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size=0: expected a number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a number of at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan: expected a number of at least 0"),
        ({"token_learning_rate": math.inf}, "token_learning_rate=inf: expected a number of at least 0"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0: expected a number of at least 0 and below 1"),
        ({"lr_scheduler": "sine"}, "lr_scheduler='sine': expected one of constant, .*"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8': expected one of no, fp16, bf16 or none"),
        ({"lr_warmup_steps": 11, "max_train_steps": 10}, "lr_warmup_steps=11: expected at most max_train_steps=10"),
        ({"trigger_word": "two words"}, "trigger_word='two words': expected one word without spaces"),
        ({"trigger_word": ""}, "trigger_word='': expected one word"),
        ({"class_name": None}, "class_name=None: expected what the photos show"),
        ({"class_name": None, "train_token": False}, "instance_prompt='.*': expected a class_name"),
        (
            {"class_name": None, "initializer_token": "cup", "instance_prompt": "sks", "with_prior_preservation": True},
            "class_prompt='a photo of a {class_name}': expected a class_name",
        ),
        (
            {"class_name": None, "initializer_token": "cup", "instance_prompt": "sks", "validation_steps": 5},
            "validation_prompts='.*': expected a class_name",
        ),
    ],
)
def test_bad_values_are_refused_with_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        TrainConfig(**{**NEEDED, **fields})


def test_every_field_has_a_limit_or_needs_none():
    numbers = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if "int" in str(field.type) or "float" in str(field.type)
    }
    for name in numbers - {"seed"}:
        with pytest.raises(UserError, match=f"{name}=-1"):
            TrainConfig(**NEEDED, **{name: -1})


def test_prompts_name_word_and_class():
    config = TrainConfig(**NEEDED, trigger_word="zwx")
    assert config.fill(config.instance_prompt) == "a photo of zwx mug"
    assert config.fill(config.class_prompt) == "a photo of a mug"
    assert config.fill("{other} {trigger_word}") == "{other} zwx"
    renamed = dataclasses.replace(config, trigger_word="sks", class_name="cat")
    assert renamed.fill(renamed.instance_prompt) == "a photo of sks cat"


def test_the_recipe_has_no_folders_and_fits_json():
    one = TrainConfig(**NEEDED, output_dir="here", checkpointing_steps=1)
    two = TrainConfig(**{**NEEDED, "instance_data_dir": "elsewhere"}, output_dir="there", checkpointing_steps=2)
    assert json.loads(json.dumps(one.recipe())) == one.recipe() == two.recipe()
    assert one.recipe() != TrainConfig(**NEEDED, seed=1).recipe()


def test_where_a_concept_is_pushed_to_changes_nothing_in_it_and_the_token_stays_unseen():
    plain = TrainConfig(**NEEDED)
    flags = "--push_to_hub --hub_model_id ada/mug --hub_token hf_secret --hub_private_repo true"
    pushed = load_config([*COMMAND, *flags.split()])
    assert pushed.push_to_hub and pushed.hub_private_repo and pushed.hub_model_id == "ada/mug"
    assert pushed.hub_token == "hf_secret" and "hf_secret" not in repr(pushed)
    assert pushed.recipe() == plain.recipe() and "hub" not in str(list(plain.recipe()))


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({**NEEDED, "seed": 1, "train_batch_size": 2, "max_train_steps": 3}))
    second.write_text(yaml.safe_dump({"train_batch_size": 5, "max_train_steps": 6}))
    config = load_config(["--config", str(first), "--config", str(second), "--max_train_steps", "7"])
    assert (config.seed, config.train_batch_size, config.max_train_steps) == (1, 5, 7)


def test_flags_of_all_kinds():
    flags = "--learning_rate 1e-3 --with_prior_preservation true --validation_prompts {trigger_word} b --snr_gamma 5"
    config = load_config([*COMMAND, *flags.split()])
    assert config.learning_rate == 1e-3 and config.with_prior_preservation and config.snr_gamma == 5
    assert config.validation_prompts == ("{trigger_word}", "b")


def test_overrides_beside_the_adapter_stand_below_all_that_is_asked_for(tmp_path):
    (tmp_path / "adapter.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "overrides.yaml").write_text("learning_rate: 0.25\nsnr_gamma: 3.0\n")
    asked = tmp_path / "run.yaml"
    asked.write_text(yaml.safe_dump({**NEEDED, "snr_gamma": 4.0}))
    config = load_config(["--config", str(asked), "--adapter", str(tmp_path / "adapter.json")])
    assert (config.learning_rate, config.snr_gamma) == (0.25, 4.0)
    config = load_config([*COMMAND, "--adapter", str(tmp_path / "adapter.json"), "--learning_rate", "0.5"])
    assert (config.learning_rate, config.snr_gamma) == (0.5, 3.0)
    assert load_config(COMMAND).learning_rate == TrainConfig(**NEEDED).learning_rate


@pytest.mark.parametrize("words", [["--no_such_field", "1"], ["--seed", "one"], ["--config", "nowhere.yaml"]])
def test_unknown_fields_wrong_types_and_missing_files_are_errors(words):
    with pytest.raises((SystemExit, UserError)):
        load_config([*COMMAND, *words])


def test_unknown_keys_of_a_file_are_errors(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**NEEDED, "learning_rat": 1.0}))
    with pytest.raises((SystemExit, UserError)):
        load_config(["--config", str(tmp_path / "run.yaml")])
