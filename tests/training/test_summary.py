import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.summary import describe_images, describe_training, warn_of_cut_prompts
from atomdiff.training.training_images import TrainingImage


@pytest.fixture
def config(train_config, tmp_path):
    folder = tmp_path / "mug"
    folder.mkdir()
    for name, size in (("a", (32, 32)), ("b", (32, 64))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "a.caption").write_text("a sks mug " + "red " * 90)
    fields = {"instance_data_dir": str(folder), "class_name": "mug", "aspect_ratio_buckets": "32,32;64,32"}
    return train_config(**fields, max_train_steps=1, checkpointing_steps=0)


def test_a_run_opens_with_what_it_found_and_names_captions_that_are_cut(config, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"captions: 1 of 2 have more than the 77 tokens .* .'a sks mug"):
        train(config)
    said = capsys.readouterr().err
    folder = tmp_path / "mug"
    for line in (
        f"mug: 2 images in {folder}, 1 caption (else 'a photo of sks mug')\n",
        "sizes: 32x32 (1), 32x64 (1)\n",
        "adapter: atoms on UNet, trigger word sks; ",
        "steps: 1, each of 2 images; adamw at 0.005\n",
    ):
        assert line in said


def test_masks_class_images_and_several_words_are_described(tmp_path):
    entries = [{"instance_data_dir": f"photos/{name}", "trigger_word": name} for name in ("mug", "cat")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    fields = {"one_file": True, "with_prior_preservation": True, "masked_loss": True, "class_name": "thing"}
    fields["preservation"] = "class"
    config = TrainConfig(
        pretrained_model_name_or_path="base",
        concepts_list=str(tmp_path / "list.json"),
        class_data_dir="things",
        **fields,
    )
    image = partial(TrainingImage, (), list, (64, 64))
    mugs = [image(captioned=True, masked=True), image(captioned=True), image(captioned=True)]
    held_out = [image(fingerprint=(f"{name}.png",)) for name in "ab"]
    assert describe_images(config, [(mugs, held_out), ([image()], [])], 200).splitlines() == [
        "mug: 3 images in photos/mug, 3 captions, 1 mask; held out: a.png, b.png",
        "cat: 1 image in photos/cat, no captions (else 'a photo of cat thing'), no masks",
        "class: 200 images in things",
        "sizes: 64x64 (4)",
    ]
    steps = "steps: 400 (100 of them done), each of 8 images and as many class images, keeping the class; adamw at"
    groups = {"adapter": [torch.empty(12345)], "token": [torch.empty(2, 32)]}
    assert describe_training(config, groups, 2, 100).splitlines() == [
        "adapter: atoms on UNet, trigger words mug, cat; 12,409 parameters",
        f"{steps} 0.005",
    ]
    token_alone = replace(config, adapter="none")
    assert describe_training(token_alone, {"token": groups["token"]}, 2, 100).splitlines() == [
        "adapter: none, trigger words mug, cat; 64 parameters",
        f"{steps} 0.01",
    ]


@pytest.mark.parametrize(("vectors", "count"), [(1, 0), (20, 1)])
def test_a_word_of_several_vectors_takes_as_many_tokens(tiny_pipe, config, vectors, count):
    prompts = {"validation prompts": ["a sks mug " + "red " * 60]}
    with pytest.warns(UserWarning, match="validation prompts: 1 of 1") if count else nullcontext():
        warn_of_cut_prompts(tiny_pipe, replace(config, num_vectors=vectors), prompts)
