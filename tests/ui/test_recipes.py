"""The options that the page makes of its fields."""

import re
from dataclasses import replace

import pytest
import torch
import yaml

from atomdiff import AtomConfig
from atomdiff.bases.architectures import ARCHITECTURES
from atomdiff.ui import recipes
from atomdiff.utils.errors import UserError


def combine(advanced="", class_name="mug", preset="tiny", num_images=3):
    return recipes.combine_options(class_name, "sks", preset, advanced, num_images)


def check(tmp_path, images, options):
    """The config of a run with these options."""
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({**options, "instance_data_dir": str(images), "output_dir": str(tmp_path)}))
    return recipes.check_config(file)


@pytest.mark.parametrize("preset", ["tiny", "default"])
def test_presets_adapt_the_block_next_to_the_output(preset):
    with torch.device("meta"):
        unet = ARCHITECTURES["sd-1.5"]()  # has more up blocks than the toybox
    config = AtomConfig.from_json_file(recipes.PRESETS[preset])
    adapted = {name for name, _ in unet.named_modules() if re.fullmatch(config["target_modules"], name)}
    assert {"conv_out", *(f"up_blocks.{block}.resnets.2.conv2" for block in (1, 2, 3))} <= adapted
    assert ("up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k" in adapted) == (preset == "default")


def test_fields_and_advanced_become_one_config(ui_config, tmp_path, teapot_images):
    text = recipes.starting_options(ui_config)
    options = combine(text, num_images=5)
    assert options["class_name"] == "mug" and options["validation_split"] == 0.2
    config = check(tmp_path, teapot_images, options)
    assert config.max_train_steps == 2
    assert config.pretrained_model_name_or_path == ui_config.pretrained_model_name_or_path
    assert config.learning_rate == 1.4e-3  # from the overrides of the preset


def test_advanced_wins():
    assert combine("trigger_word: zwx\nvalidation_split: 0")["trigger_word"] == "zwx"
    assert "validation_split" not in combine(num_images=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_name": " "}, "no class name"),
        ({"preset": "huge"}, "expected one of tiny, default, faithful"),
        ({"advanced": "seed: ["}, "Advanced: cannot be read as YAML"),
        ({"advanced": "- seed"}, "one option per line"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        combine(**fields)


def test_unknown_options_are_refused_in_one_line(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("pretrained_model_name_or_path: x\nsteps: 3\n")
    with pytest.raises(UserError, match="there is no option 'steps'$"):
        recipes.check_config(file)


def test_the_page_begins_with_a_config_that_fits_the_base(ui_config, tiny_xl_pipe_folder):
    real = yaml.safe_load(recipes.starting_options(replace(ui_config, train_config=None)))
    assert real["resolution"] == 512 and real["validation_steps"] == 100
    xl = replace(ui_config, train_config=None, pretrained_model_name_or_path=str(tiny_xl_pipe_folder))
    assert yaml.safe_load(recipes.starting_options(xl))["resolution"] == 1024


@pytest.mark.parametrize(
    ("advanced", "rate"), [("", 1.4e-3), ("adapter: configs/experiments/lora/attention_r16/adapter.json", 5e-4)]
)
def test_a_rate_that_a_config_has_for_its_adapter_is_not_that_of_another(
    ui_config, tmp_path, teapot_images, advanced, rate
):
    text = recipes.starting_options(replace(ui_config, train_config=None))  # configs/sd15.yaml
    assert check(tmp_path, teapot_images, combine(f"{text}{advanced}")).learning_rate == rate


def test_a_rate_of_no_adapter_is_kept(ui_config, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("learning_rate: 3e-4\n")
    assert "learning_rate: 0.0003" in recipes.starting_options(replace(ui_config, train_config=str(file)))


def test_training_opens_the_base_as_the_page_does(ui_config, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("pretrained_model_name_or_path: other.safetensors\nrevision: main\nseed: 3\n")
    base = {"pretrained_model_name_or_path": "sd2.safetensors", "variant": "fp16", "single_file_config": "sd2-base"}
    options = yaml.safe_load(recipes.starting_options(replace(ui_config, train_config=str(file), **base)))
    assert {name: options[name] for name in base} == base
    assert "revision" not in options and options["seed"] == 3


def test_sizes_names_and_commands(tiny_pipe_folder, tmp_path):
    assert recipes.native_side(str(tiny_pipe_folder)) == 32
    assert recipes.native_side("somebody/base") is None
    assert recipes.training_side({"pretrained_model_name_or_path": str(tiny_pipe_folder)}) == 32
    assert recipes.training_side({"pretrained_model_name_or_path": str(tiny_pipe_folder), "resolution": 64}) == 64
    assert recipes.concept_name("Big mug", "sks") == "sks-big-mug"
    with pytest.raises(UserError, match="no letter"):
        recipes.concept_name("/", "..")
    assert recipes.command_line(tmp_path / "my file.yaml").endswith("my file.yaml'")
    assert recipes.samples_per_step({"train_batch_size": 3, "with_prior_preservation": True}) == 6
