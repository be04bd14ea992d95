"""What all runs of a command read and write is checked before the first of them begins."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
from PIL import Image

from atomdiff.cli.main import main
from atomdiff.training import dreambooth
from atomdiff.training.config import TrainConfig
from atomdiff.training.preflight import check_runs
from atomdiff.training.training_images import choose_held_out
from atomdiff.utils.errors import UserError


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run on two photos, beside the folder of its base."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "base/unet"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / f"{name}.png")
    return TrainConfig(
        pretrained_model_name_or_path="base", instance_data_dir="photos", class_name="mug", output_dir="out"
    )


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": "photos"}, "output_dir='photos' is instance_data_dir, too"),
        ({"output_dir": "out/../photos/"}, "is instance_data_dir, too"),
        ({"output_dir": "."}, "the result='photos' is instance_data_dir"),
        ({"output_dir": "photos/mask"}, "output_dir='photos/mask' is instance_data_dir .its masks., too"),
        ({"cache_dir": "photos"}, "the cache='photos' is instance_data_dir"),
        ({"logging_dir": "../photos"}, "logging_dir='out/../photos' is instance_data_dir"),
        ({"class_data_dir": "photos", "with_prior_preservation": True}, "class_data_dir='photos' is instance_d"),
        ({"class_data_dir": "out", "with_prior_preservation": True}, "output_dir='out' is class_data_dir, too"),
        (
            {"class_data_dir": "out/validation", "with_prior_preservation": True},
            "validation images='out/validation' is",
        ),
        ({"output_dir": "base/unet"}, "output_dir='base/unet' is inside the base"),
        ({"cache_dir": "base"}, "the cache='base' is the base, too"),
        ({"output_dir": "photos/a.png/out"}, "output_dir=.*cannot be written there .*[Nn]ot a directory"),
        ({"output_dir": "x" * 300}, "output_dir=.*cannot be a path .File name too long"),
        ({"output_dir": "out\0"}, "output_dir=.*cannot be a path"),
        ({"trigger_word": "zwx", "instance_prompt": "a photo"}, "trigger_word='zwx': no prompt contains it"),
        ({"preservation": "class", "instance_prompt": "a mug", "train_token": False}, "found the prompt 'a mug'"),
        ({"preservation": "blank", "instance_prompt": "", "train_token": False}, "found the prompt ''"),
        ({"preservation": "class", "trigger_word": "mug"}, "which has 'mug' in it"),
        (
            {"validation_data_dir": "photos"},
            "photos: a.png is [ab].png of photos, too; remove one: held-out",
        ),
        ({"validation_data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"validation_data_dir": "more", "output_dir": "more"}, "output_dir='more' is validation_data_dir, too"),
        (
            {"validation_split": 0.9},
            "validation_split=0.9: found 2 in photos, of which 2 would be held out",
        ),
        ({"resolution": 128}, "shorter side under 64 pixels: a.png"),
        ({"masked_loss": True}, "a.png"),
    ],
)
def test_what_would_go_wrong_is_told_and_nothing_is_changed(config, tmp_path, fields, message):
    adapter = tmp_path / "lora.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["to_q"]}))
    if "masked_loss" in fields:
        (tmp_path / "photos" / "mask").mkdir()
        (tmp_path / "photos" / "mask" / "a.png").write_text("no image")
    (tmp_path / "out" / "validation").mkdir(parents=True)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message):
        check_runs([replace(config, adapter=str(adapter), **fields)])
    assert everything(tmp_path) == before


def test_folders_inside_one_another_that_do_no_harm_are_fine(config, tmp_path):
    check_runs([replace(config, output_dir="photos/out"), replace(config, output_dir=".", cache_dir="out/cache")])
    assert not [path for path in everything(tmp_path) if path.endswith(".unfinished")]


def test_copies_of_held_out_images_are_refused(config, tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "photos" / "c.png")  # a and b are the same
    seeds = {True: [], False: []}
    for seed in range(8):
        run = replace(config, validation_split=0.3, seed=seed)
        held_out = choose_held_out(3, 0.3, seed, run.subjects[0])
        seeds[held_out == {2}].append(run)
    check_runs(seeds[True])
    for run in seeds[False]:
        with pytest.raises(UserError, match=r"photos: [ab].png is [ab].png of photos, too; remove one: held-out"):
            check_runs([run])


def test_masks_are_looked_for_in_all_runs_and_not_among_held_out_images(config, tmp_path):
    shutil.copytree(tmp_path / "photos", tmp_path / "more")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "mask").mkdir()
    Image.new("L", (32, 32), 255).save(tmp_path / "photos" / "mask" / "b.png")
    run = replace(config, masked_loss=True)
    check_runs([run])
    message = "no image that is trained on has a mask; expected masks in {}, named like the images"
    with pytest.raises(UserError, match=message.format("more/mask")):
        check_runs([run, replace(run, instance_data_dir="more", output_dir="out/more")])
    split = [replace(run, validation_split=0.4, seed=seed) for seed in range(8)]
    held_out = [choose_held_out(2, 0.4, each.seed, each.subjects[0]) == {1} for each in split]
    assert 0 < sum(held_out) < len(split)
    for each, without_mask in zip(split, held_out, strict=True):
        with pytest.raises(UserError, match=message.format("photos/mask")) if without_mask else nullcontext():
            check_runs([each])


@pytest.mark.parametrize("buckets", ["auto", "32,96"])
def test_images_that_fit_a_bucket_are_not_too_small(config, tmp_path, buckets):
    Image.new("RGB", (96, 30), "blue").save(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match="shorter side under 32 pixels"):
        check_runs([replace(config, resolution=64)])
    check_runs([replace(config, resolution=64, aspect_ratio_buckets=buckets)])


def test_links_are_followed(config, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(UserError, match="output_dir='link' is instance_data_dir"):
        check_runs([replace(config, output_dir="link")])


def test_photos_that_class_images_fell_among_are_refused(config, tmp_path):
    (tmp_path / "photos" / "class_images.json").write_text("{}")
    with pytest.raises(UserError, match="photos: holds class images that were generated there"):
        check_runs([config])


def test_a_concept_file_in_the_way_is_told(config, tmp_path):
    (tmp_path / "out" / "photos.atoms.safetensors").mkdir(parents=True)
    with pytest.raises(UserError, match="photos.atoms.safetensors is in the way"):
        check_runs([config])


@pytest.mark.parametrize("damage", ["photo", "caption", "folder", "class"])
def test_all_runs_are_looked_at_before_the_first_begins(config, tmp_path, monkeypatch, capsys, damage):
    for folder in ("mug", "cat", "classes"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / folder / "a.png")
    damaged = {"photo": "cat/a.png", "caption": "cat/a.txt", "class": "classes/b.png"}
    if damage in damaged:
        (tmp_path / damaged[damage]).write_bytes(b"caf\xe9")
    second = {"instance_data_dir": "dog" if damage == "folder" else "cat", "class_data_dir": "classes"}
    (tmp_path / "list.json").write_text(json.dumps([{"instance_data_dir": "mug"}, second]))
    begun = []
    monkeypatch.setattr(dreambooth, "train", begun.append)
    words = ["train", "--pretrained_model_name_or_path", "base", "--concepts_list", "list.json", "--class_name", "mug"]
    assert main([*words, "--with_prior_preservation"]) == 2
    assert not begun and not (tmp_path / "out").exists()
    assert {"folder": "dog: no such folder"}.get(
        damage, damaged.get(damage, "").split("/")[-1]
    ) in capsys.readouterr().err
