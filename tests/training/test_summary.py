import copy
import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.summary import describe_images, describe_training, warn_of_cut_prompts
from atomdiff.training.training_images import TrainingImage
from atomdiff.utils.errors import UserError


@pytest.fixture
def config(tmp_path, tiny_pipe_folder):
    (tmp_path / "mug").mkdir()
    for name, size in (("a", (32, 32)), ("b", (32, 64))):
        Image.new("RGB", size, "red").save(tmp_path / "mug" / f"{name}.png")
    (tmp_path / "mug" / "a.caption").write_text("a sks mug " + "red " * 90)
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_pipe_folder),
        instance_data_dir=str(tmp_path / "mug"),
        class_name="mug",
        output_dir=str(tmp_path / "out"),
        aspect_ratio_buckets="32,32;64,32",
        max_train_steps=1,
        train_batch_size=2,
        num_inference_steps=1,
        checkpointing_steps=0,
        report_to=None,
    )


def test_a_run_opens_with_what_it_found_and_names_captions_that_are_cut(config, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"captions: 1 of 2 have more than the 77 tokens .* .'a sks mug"):
        train(config)
    said = capsys.readouterr().err
    folder = tmp_path / "mug"
    for line in (
        f"mug: 2 images in {folder}, 1 caption (else 'a photo of sks mug')\n",
        "sizes: 32x32 (1), 32x64 (1)\n",
        "trained: atoms on UNet, the word sks; ",
        "steps: 1, of 2 images; adamw at 0.005\n",
    ):
        assert line in said


def test_masks_class_images_and_several_words_are_told(tmp_path):
    entries = [{"instance_data_dir": f"photos/{name}", "trigger_word": name} for name in ("mug", "cat")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    fields = {"one_file": True, "with_prior_preservation": True, "masked_loss": True, "class_name": "thing"}
    config = TrainConfig(
        pretrained_model_name_or_path="base",
        concepts_list=str(tmp_path / "list.json"),
        class_data_dir="things",
        **fields,
    )
    image = partial(TrainingImage, (), list, (64, 64))
    mugs = [image(captioned=True, masked=True), image(captioned=True), image(captioned=True)]
    assert describe_images(config, [mugs, [image()]], 200).splitlines() == [
        "mug: 3 images in photos/mug, 3 captions, 1 mask",
        "cat: 1 image in photos/cat, no captions (else 'a photo of cat thing'), no masks",
        "class: 200 images in things",
        "sizes: 64x64 (4)",
    ]
    assert describe_training(config, 12345, 2, 100).splitlines() == [
        "trained: atoms on UNet, the word mug, cat; 12,345 parameters",
        "steps: 400, of which 100 are done, of 8 images and 8 of the class; adamw at 0.005",
    ]


@pytest.mark.parametrize("vectors", [1, 20])
def test_a_word_of_several_vectors_takes_as_many_tokens(tiny_pipe, config, vectors, recwarn, user_warnings):
    config = replace(config, num_vectors=vectors)
    warn_of_cut_prompts_quietly(tiny_pipe, config, {"validation prompts": ["a sks mug " + "red " * 60]})
    assert [str(warning.message)[:24] for warning in user_warnings(recwarn)] == ["validation prompts: 1 of"] * (
        vectors > 1
    )


def warn_of_cut_prompts_quietly(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warn_of_cut_prompts(*arguments)


def test_class_images_that_are_not_finite_are_never_trained_on(config, pipe_template, tmp_path):
    pipe = copy.deepcopy(pipe_template)
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "spoiled")
    (tmp_path / "mug" / "a.caption").unlink()
    changes = {"pretrained_model_name_or_path": str(tmp_path / "spoiled"), "with_prior_preservation": True}
    with pytest.raises(UserError, match="the image of 'a photo of a mug' with seed .* has values that are not finite"):
        train(replace(config, num_class_images=1, **changes))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_contact_sheet_that_is_not_finite_is_warned_of_and_costs_no_training(config, pipe_template, tmp_path):
    pipe = copy.deepcopy(pipe_template)
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "spoiled")
    (tmp_path / "mug" / "a.caption").unlink()
    with pytest.warns(UserWarning, match="step 1: no row of the contact sheet: .* not finite"):
        path = train(replace(config, pretrained_model_name_or_path=str(tmp_path / "spoiled"), validation_steps=1))
    assert path.is_file() and not list((tmp_path / "out").rglob("*.png"))
