import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atomdiff.training.config import TrainConfig, load_config
from atomdiff.utils.errors import UserError

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
        ({"prediction_type": "noise"}, "prediction_type='noise': expected one of epsilon, v_prediction, sample, flow"),
        ({"timestep_sampling": "late"}, "timestep_sampling='late': expected one of uniform, logit_normal, cubic"),
        ({"logit_mean": 1.0}, "logit_mean=1.0, logit_std=1.0: expected timestep_sampling='logit_normal'"),
        ({"logit_mean": math.inf, "timestep_sampling": "logit_normal"}, "logit_mean=inf: expected a number"),
        ({"min_timestep": 9, "max_timestep": 9}, "max_timestep=9: expected more than min_timestep=9"),
        (
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True, prediction_type='epsilon': expected prediction_type v_prediction or sample",
        ),
        ({"prediction_type": "sample", "flow_shift": 3.0}, "flow_shift=3.0: expected prediction_type 'flow'"),
        ({"flow_shift": 0.0}, "flow_shift=0.0: expected a number of at least 0.01"),
        ({"lr_scheduler": "sine"}, "lr_scheduler='sine': expected one of constant, .*"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8': expected one of no, fp16, bf16 or none"),
        (
            {"optimizer": "adamw_schedulefree", "train_text_encoder_ti_frac": 0.5},
            "optimizer='adamw_schedulefree', train_text_encoder_ti_frac=0.5: expected 1",
        ),
        ({"lr_warmup_steps": 11, "max_train_steps": 10}, "lr_warmup_steps=11: expected at most max_train_steps=10"),
        ({"aspect_ratio_buckets": "512x768"}, "aspect_ratio_buckets='512x768': expected \"auto\", or"),
        ({"repeats": 0}, "repeats=0: expected a number of at least 1"),
        ({"repeats": 10**9}, "repeats=1000000000: expected a number of at least 1 and at most 10000"),
        ({"snr_gamma": 0.0}, "snr_gamma=0.0: expected a number of at least 1e-09"),
        ({"prodigy_d_coef": 0.0}, "prodigy_d_coef=0.0: expected a number of at least 1e-09"),
        ({"caption_dropout": 1.0}, "caption_dropout=1.0: expected a number of at least 0 and below 1"),
        ({"keep_tokens": 1}, "keep_tokens=1: expected shuffle_captions with it"),
        ({"preservation": "prior"}, "preservation='prior': expected one of none, class, blank"),
        ({"preservation_weight": 0.5}, "preservation_weight=0.5: expected preservation class or blank with it"),
        (
            {"preservation": "blank", "preservation_weight": -1.0},
            "preservation_weight=-1.0: expected a number",
        ),
        (
            {"class_name": None, "initializer_token": "cup", "instance_prompt": "sks", "preservation": "class"},
            "class_name=None, preservation='class': expected what the images show",
        ),
        (
            {"preservation": "blank", "caption_dropout": 0.1},
            "preservation='blank', caption_dropout=0.1: expected one of them",
        ),
        ({"unmasked_weight": 0.5}, "unmasked_weight=0.5: expected masked_loss with it"),
        ({"trigger_word": "two words"}, "trigger_word='two words': expected one word without spaces"),
        ({"trigger_word": ""}, "trigger_word='': expected one word"),
        ({"class_name": None}, "class_name=None: expected what the images show"),
        ({"class_name": "caf\udce9"}, "class_name='.*': found .*, which is no character; expected text in UTF-8"),
        ({"trigger_word": "s\udce9"}, "trigger_word='.*': found .*, which is no character"),
        ({"instance_prompt": "sks \ud83d"}, "instance_prompt='.*': found .*, which is no character"),
        (
            {"validation_prompts": ("sks \ud83d",), "validation_steps": 5},
            "validation_prompts='.*': found .*, which is no character",
        ),
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
    (subject,) = TrainConfig(**NEEDED, trigger_word="zwx").subjects
    assert subject.fill(subject.instance_prompt) == "a photo of zwx mug"
    assert subject.fill(subject.class_prompt) == "a photo of a mug"
    assert subject.fill("{other} {trigger_word} {trigger}") == "{other} zwx zwx"
    assert subject.phrase == "zwx mug"
    (renamed,) = TrainConfig(**NEEDED | {"class_name": "cat"}).subjects
    assert renamed.fill(renamed.instance_prompt) == "a photo of sks cat"


LISTED = [
    {"instance_data_dir": "photos/mug", "class_name": "mug", "trigger_word": "sks"},
    {"instance_data_dir": "photos/rex", "class_name": "robot", "trigger_word": "zwx"},
]


def listed(tmp_path, entries=LISTED, **changes):
    file = tmp_path / "shelf.yaml"
    file.write_text(json.dumps(entries))
    fields = {"pretrained_model_name_or_path": "base", "concepts_list": str(file), "output_dir": "out", **changes}
    return TrainConfig(**fields)


def test_a_list_of_concepts_stands_for_a_run_each(tmp_path):
    mug, rex = listed(tmp_path, learning_rate=0.1).runs()
    assert (mug.output_dir, rex.output_dir) == (str(Path("out/mug")), str(Path("out/rex")))
    assert (mug.trigger_word, rex.trigger_word, rex.class_name) == ("sks", "zwx", "robot")
    assert mug.learning_rate == rex.learning_rate == 0.1
    repeated = listed(tmp_path, [LISTED[0], LISTED[1] | {"repeats": 3}], repeats=2).runs()
    assert [run.repeats for run in repeated] == [2, 3]
    assert (mug.name, rex.name) == ("mug", "rex")


def test_the_concepts_of_a_list_have_a_repository_each(tmp_path):
    runs = listed(tmp_path, hub_model_id="ada/shelf", push_to_hub=True).runs()
    assert [run.hub_model_id for run in runs] == ["ada/shelf-mug", "ada/shelf-rex"]
    assert [run.hub_model_id for run in listed(tmp_path, push_to_hub=True).runs()] == [None, None]
    (one,) = listed(tmp_path, hub_model_id="ada/shelf", one_file=True).runs()
    assert one.hub_model_id == "ada/shelf"


def test_repositories_have_names_that_the_hub_allows(tmp_path):
    folders = ["my mug", "a--b", "c..d", "mug.v1", "mug.v2", "-e_(2)"]
    entries = [LISTED[0] | {"instance_data_dir": f"photos/{folder}"} for folder in folders]
    names = ["my-mug", "a-b", "c-d", "mug.v1", "mug.v2", "e_-2"]
    assert [run.repository for run in listed(tmp_path, entries, push_to_hub=True).runs()] == names
    shelf = listed(tmp_path, entries, push_to_hub=True, hub_model_id="ada/x").runs()
    assert [run.repository for run in shelf] == [f"ada/x-{name}" for name in names]


@pytest.mark.parametrize(
    ("folders", "repository", "message"),
    [
        (["my mug", "My-mug"], None, "shelf.yaml: 'my mug' and 'My-mug' would both be pushed to My-mug; rename one"),
        (["a--b", "a-b"], "ada/x", "'a--b' and 'a-b' would both be pushed to ada/x-a-b; rename one"),
        (["mug", "m" * 100], None, "cannot push 'm+' to 'm+': .*96.* name another hub_model_id, or rename"),
        (["mug", "カップ"], "ada/x", "cannot push 'カップ' to 'ada/x-': .* name another hub_model_id, or rename"),
        (["mug", "rex"], "ada/x y", "cannot push 'mug' to 'ada/x y-mug': "),
    ],
)
def test_repositories_that_cannot_be_are_refused_before_the_first_run(tmp_path, folders, repository, message):
    entries = [LISTED[0] | {"instance_data_dir": f"photos/{folder}"} for folder in folders]
    listed(tmp_path, entries, hub_model_id=repository)
    with pytest.raises(UserError, match=message):
        listed(tmp_path, entries, hub_model_id=repository, push_to_hub=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_best": True}, "keep_best=True: expected held-out images; set validation_split 0.2 or validation_data"),
        ({"keep_best": True, "validation_split": 0.2, "validation_loss_steps": 0}, "keep_best=True, validation_loss"),
        ({"validation_split": 0.2, "validation_loss_steps": 0}, "validation_loss_steps=0: expected more than 0 where"),
        ({"validation_data_dir": "more", "validation_loss_steps": 0}, "validation_loss_steps=0: expected more than 0"),
        ({"validation_data_dir": "more", "validation_split": 0.2}, "validation_data_dir='more': expected one of them"),
        ({"validation_split": 1.0}, "validation_split=1.0: expected a number of at least 0 and below 1"),
        ({"validation_data_dir": ""}, "validation_data_dir='': expected a path"),
    ],
)
def test_held_out_images_and_what_they_are_for_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**NEEDED, **fields)


def test_each_subject_of_a_list_has_its_own_held_out_images(tmp_path):
    entries = [LISTED[0] | {"validation_data_dir": "more"}, LISTED[1]]
    assert [run.validation_data_dir for run in listed(tmp_path, entries).runs()] == ["more", None]
    with pytest.raises(UserError, match="validation_data_dir='more': expected one for each subject, in the entries"):
        listed(tmp_path, entries, validation_data_dir="more")
    kept = listed(tmp_path, entries, keep_best=True)
    with pytest.raises(UserError, match="keep_best=True: expected held-out images"):
        kept.runs()
    assert listed(tmp_path, entries, keep_best=True, one_file=True).runs()


def test_a_sheet_needs_a_prompt():
    with pytest.raises(UserError, match="validation_prompts=.*: expected at least one prompt, or validation_steps 0"):
        TrainConfig(**NEEDED, validation_steps=2, validation_prompts=())


def test_a_list_of_concepts_can_make_up_one_run(tmp_path):
    config = listed(tmp_path, one_file=True)
    assert config.runs() == (config,) and config.name == "shelf"
    assert [subject.phrase for subject in config.subjects] == ["sks mug", "zwx robot"]
    other = listed(tmp_path, [LISTED[0], LISTED[1] | {"class_name": "cat"}], one_file=True)
    assert config.snapshot() != other.snapshot() and json.loads(json.dumps(config.snapshot())) == config.snapshot()


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ("no list", {}, "a list of mappings"),
        ([], {}, "a list of mappings"),
        ([{"class_name": "mug"}], {}, "without instance_data_dir"),
        ([LISTED[0] | {"colour": "red"}], {}, "unknown colour; a subject has"),
        ([LISTED[0] | {"class_name": 3}], {}, "class_name=3: expected a text"),
        ([LISTED[0] | {"repeats": "3"}], {}, "repeats='3': expected a whole number from 1 to 10000"),
        ([LISTED[0] | {"repeats": True}], {}, "repeats=True: expected a whole number from 1 to 10000"),
        ([{"instance_data_dir": "photos/mug"}], {}, "class_name=None"),
        ([LISTED[0], LISTED[1] | {"trigger_word": "sks"}], {"one_file": True}, "trigger_word='sks' is that of two"),
        ([LISTED[0], LISTED[1] | {"instance_data_dir": "other/mug"}], {}, "name='mug' is that of two"),
        (
            [LISTED[0], LISTED[1] | {"trigger_word": "sks_1"}],
            {"one_file": True},
            "sks and sks_1 are tokens of one word",
        ),
        ([LISTED[0], LISTED[1] | {"trigger_word": "SKS"}], {"one_file": True}, "words sks, SKS: CLIP ignores case"),
        (LISTED, {"instance_data_dir": "photos"}, "found both"),
        (LISTED, {"concepts_list": None}, "found neither"),
        (LISTED, {"concepts_list": None, "instance_data_dir": "a", "one_file": True}, "expected several subjects"),
        (LISTED, {"concepts_list": "missing.yaml"}, "cannot be read"),
    ],
)
def test_a_list_of_concepts_that_cannot_be_used(tmp_path, entries, changes, message):
    with pytest.raises(UserError, match=message):
        listed(tmp_path, entries, **changes)


def test_nothing_in_a_list_of_concepts_and_encodings_as_people_have_them(tmp_path):
    file = tmp_path / "shelf.yaml"
    entries = "- instance_data_dir: ~/mug\n  class_name: none\n  initializer_token: null\n  trigger_word: no\n"
    file.write_text(entries, encoding="utf-16")
    config = TrainConfig(
        pretrained_model_name_or_path="base",
        concepts_list=str(file),
        class_name="cup",
        train_token=False,
        instance_prompt="a",
    )
    (subject,) = config.subjects
    assert subject.instance_data_dir == str(Path.home() / "mug")
    assert (subject.class_name, subject.initializer_token, subject.trigger_word) == (None, None, "no")


def test_the_snapshot_has_no_folders_and_fits_json():
    one = TrainConfig(**NEEDED, output_dir="here", checkpointing_steps=1)
    two = TrainConfig(**{**NEEDED, "instance_data_dir": "elsewhere"}, output_dir="there", checkpointing_steps=2)
    assert json.loads(json.dumps(one.snapshot())) == one.snapshot() == two.snapshot()
    assert one.snapshot() != TrainConfig(**NEEDED, seed=1).snapshot()


def test_where_a_concept_is_pushed_to_changes_nothing_in_it_and_the_token_stays_unseen():
    plain = TrainConfig(**NEEDED)
    flags = "--push_to_hub --hub_model_id ada/mug --hub_token hf_secret --hub_private_repo true"
    pushed = load_config([*COMMAND, *flags.split()])
    assert pushed.push_to_hub and pushed.hub_private_repo and pushed.hub_model_id == "ada/mug"
    assert pushed.hub_token == "hf_secret" and "hf_secret" not in repr(pushed)
    assert pushed.snapshot() == plain.snapshot() and "hub" not in str(list(plain.snapshot()))


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({**NEEDED, "seed": 1, "train_batch_size": 2, "max_train_steps": 3}))
    second.write_text(yaml.safe_dump({"train_batch_size": 5, "max_train_steps": 6}))
    config = load_config(["--config", str(first), "--config", str(second), "--max_train_steps", "7"])
    assert (config.seed, config.train_batch_size, config.max_train_steps) == (1, 5, 7)


def test_help_does_without_torch():
    code = """
import sys
from atomdiff.cli.main import main
try:
    main(["train", "--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
sys.exit("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "--max_train_steps" in done.stdout


def test_flags_of_all_kinds():
    flags = "--learning_rate 1e-3 --with_prior_preservation true --validation_prompts {trigger_word} b --snr_gamma 5"
    config = load_config([*COMMAND, *flags.split()])
    assert config.learning_rate == 1e-3 and config.with_prior_preservation and config.snr_gamma == 5
    assert config.validation_prompts == ("{trigger_word}", "b")


@pytest.mark.slow
def test_overrides_beside_the_adapter_stand_below_all_that_is_asked_for_with_it(tmp_path):
    adapter, asked = tmp_path / "adapter.json", tmp_path / "run.yaml"
    adapter.write_text('{"peft_type": "LORA"}')
    (tmp_path / "overrides.yaml").write_text("learning_rate: 0.25\nsnr_gamma: 3.0\n")

    def rate_and_gamma(*words):
        config = load_config(list(map(str, words)))
        return config.learning_rate, config.snr_gamma

    assert rate_and_gamma(*COMMAND, "--adapter", adapter, "--learning_rate", "0.5") == (0.5, 3.0)
    asked.write_text(yaml.safe_dump({**NEEDED, "snr_gamma": 4.0, "adapter": str(adapter)}))
    assert rate_and_gamma("--config", asked) == (0.25, 4.0)
    asked.write_text(yaml.safe_dump({**NEEDED, "snr_gamma": 4.0}))
    assert rate_and_gamma("--adapter", adapter, "--config", asked) == (0.25, 4.0)
    assert rate_and_gamma("--config", asked, "--adapter", adapter) == (0.25, 3.0)  # 4.0 was for another adapter
    assert rate_and_gamma(f"--config={asked}", f"--adapter={adapter}", "--snr_gamma=5") == (0.25, 5.0)
    assert rate_and_gamma("--config", asked, "--snr_gamma", "5", "--adapter", adapter) == (0.25, 5.0)
    assert load_config(COMMAND).learning_rate == TrainConfig(**NEEDED).learning_rate


@pytest.mark.parametrize("words", [["--no_such_field", "1"], ["--seed", "one"], ["--config", "nowhere.yaml"]])
def test_unknown_fields_wrong_types_and_missing_files_are_errors(words):
    with pytest.raises((SystemExit, UserError)):
        load_config([*COMMAND, *words])


def test_unknown_keys_of_a_file_are_errors(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**NEEDED, "learning_rat": 1.0}))
    with pytest.raises((SystemExit, UserError)):
        load_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_configs_for_real_bases_need_photos_and_a_class_only(name):
    config = load_config(["--config", f"configs/{name}.yaml", "--instance_data_dir", "photos", "--class_name", "mug"])
    assert config.preservation == "class" and config.resolution == {"sd15": 512, "sdxl": 1024}[name]
    assert config.learning_rates["adapter"] == config.learning_rates["token"] == 2e-3
    lora = "configs/experiments/lora/attention_r16/adapter.json"
    of_lora = load_config(["--config", f"configs/{name}.yaml", *COMMAND, "--adapter", lora])
    assert of_lora.learning_rates["adapter"] == 5e-4


def test_the_demo_config_is_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", "configs/demo.yaml", "--instance_data_dir", "photos", "--class_name", "mug"])
    assert config.max_train_steps == 300 and config.learning_rates["adapter"] == 1.4e-3
