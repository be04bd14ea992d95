"""Class images in a folder, and in runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from atomdiff.training import class_images
from atomdiff.training.class_images import ensure_class_images
from atomdiff.training.dataset import DreamBoothDataset
from atomdiff.training.dreambooth import train
from atomdiff.utils.errors import UserError


@pytest.fixture
def config(train_config):
    return train_config(max_train_steps=1, with_prior_preservation=True, num_class_images=2)


def fake_images(seeds, made=None):
    if made is not None:
        made.append(list(seeds))
    return [Image.new("RGB", (8, 8), (seed, len(seeds), 0)) for seed in seeds]


def contents(folder: Path):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_class_images_are_made_once(tmp_path):
    made = []
    for _ in range(2):
        ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
    assert made == [[0, 1], [2, 3], [4]]
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_an_interrupted_set_is_completed_with_the_same_images(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ensure_class_images(whole, 5, 2, {"prompt": "a mug"}, fake_images)

    def stop(seeds):
        if seeds[0] == 2:
            raise KeyboardInterrupt
        return fake_images(seeds)

    with pytest.raises(KeyboardInterrupt):
        ensure_class_images(stopped, 5, 2, {"prompt": "a mug"}, stop)
    (stopped / "class-00001.png").unlink()
    ensure_class_images(stopped, 5, 2, {"prompt": "a mug"}, fake_images)
    assert contents(whole) == contents(stopped)


def test_processes_share_the_work(tmp_path):
    for rank in range(3):
        ensure_class_images(tmp_path, 7, 2, {}, fake_images, share=(rank, 3))
        assert len(list(tmp_path.glob("*.png"))) == [3, 5, 7][rank]


def test_two_runs_share_the_work_in_one_folder(tmp_path):
    made = []

    def slow(seeds):
        if not made:  # another run does the rest in the meantime
            made.append(list(seeds))
            ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
        return fake_images(seeds)

    ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, slow)
    assert made == [[0, 1], [0, 1], [2, 3], [4]]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_record_blocks_no_class_images(tmp_path):
    made = []
    ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, fake_images)
    whole = (tmp_path / "class_images.json").read_bytes()
    (tmp_path / "class_images.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="class_images.json: damaged; the class images beside it are assumed"):
        ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
    assert not made and (tmp_path / "class_images.json").read_bytes() == whole


def test_class_images_of_another_prompt_are_refused(tmp_path):
    ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, fake_images)
    with pytest.raises(UserError, match="prompt 'a mug', now 'a cat'"):
        ensure_class_images(tmp_path, 1, 2, {"prompt": "a cat"}, fake_images)


def test_images_that_lie_there_already_count(tmp_path):
    made = []
    for name in ("one.png", "two.jpg"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    ensure_class_images(tmp_path, 3, 2, {}, lambda seeds: fake_images(seeds, made))
    assert made == [[0]]


def test_enough_images_of_somebody_else_serve_every_base(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    for base in ("this", "that"):
        ensure_class_images(tmp_path, 1, 2, {"unet": base}, fake_images)
    assert [file.name for file in tmp_path.iterdir()] == ["one.png"]


def test_who_removes_the_record_keeps_the_images(tmp_path):
    made = []
    ensure_class_images(tmp_path, 2, 2, {"base": "this"}, lambda seeds: fake_images(seeds, made))
    with pytest.raises(UserError, match="base 'this', now not noted; unet not noted, now 'that'.*class_images.json in"):
        ensure_class_images(tmp_path, 2, 2, {"unet": "that"}, fake_images)
    (tmp_path / "class_images.json").unlink()
    ensure_class_images(tmp_path, 2, 2, {"unet": "that"}, lambda seeds: fake_images(seeds, made))
    assert made == [[0, 1]]


@pytest.mark.slow
def test_class_images_are_generated_once_and_trained_on(config, monkeypatch, recorded):
    config = dataclasses.replace(config, num_class_images=3)
    calls = []
    usual, batches = class_images.generate_images, recorded(DreamBoothDataset)

    def note(config, pipe, side, prompts, seeds):
        calls.append((prompts, list(seeds)))
        return usual(config, pipe, side, prompts, seeds)

    monkeypatch.setattr(class_images, "generate_images", note)
    for _ in range(2):
        train(config)
    ((prompts, seeds),) = calls
    assert prompts == ["a photo of a teapot"] * 3 and len(set(seeds)) == 3
    dataset, batch = batches[0]
    assert len(list((Path(config.output_dir) / "class_images").glob("*.png"))) == 3
    assert batch.latents.shape == (4, 4, 8, 8) and batch.num_instance_images == 2
    prompts = [dataset.prompts[number] for number in batch.prompts]
    assert prompts == ["a photo of sks teapot"] * 2 + ["a photo of a teapot"] * 2


@pytest.mark.slow
def test_class_images_of_another_base_are_refused(config, tiny_pipe, tmp_path):
    train(config)
    tiny_pipe.unet.up_blocks[0].resnets[0].conv1.weight.data[1, 2] += 1e-3  # a little, far from conv_out
    tiny_pipe.save_pretrained(tmp_path / "tuned")
    tuned = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "tuned"))
    with pytest.raises(
        UserError, match=r"generated with other settings \(unet '.*', now '[^;]*'\)\. .*class_images.json"
    ):
        train(tuned)
    record = Path(config.output_dir) / "class_images" / "class_images.json"
    then = json.loads(record.read_text())
    record.write_text(json.dumps({"prompt": then["prompt"], "base": "0123456789abcdef"}))  # as it was once
    with pytest.raises(UserError, match="base '0123456789abcdef', now not noted; .*unet not noted, now '[0-9a-f]{16}'"):
        train(config)
    record.unlink()
    train(config)
    assert json.loads(record.read_text()) == then


@pytest.mark.slow
def test_class_images_depend_on_the_scheduler_but_not_on_defaults_that_are_written_out(config):
    train(config)
    train(dataclasses.replace(config, prediction_type="v_prediction", rescale_betas_zero_snr=False))  # as it is
    for changes in ({"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}, {"prediction_type": "flow"}):
        with pytest.raises(UserError, match=r"generated with other settings \(scheduler '\w+', now '\w+'\)"):
            train(dataclasses.replace(config, **changes))


@pytest.mark.slow
def test_class_images_have_a_folder_for_every_class(config, tmp_path):
    config = dataclasses.replace(config, class_data_dir=str(tmp_path / "class" / "{class_name}"))
    for name in ("mug", "cat"):
        train(dataclasses.replace(config, class_name=name))
    assert sorted(folder.name for folder in (tmp_path / "class").iterdir()) == ["cat", "mug"]


@pytest.mark.slow
def test_class_images_that_are_not_finite_or_black_are_not_trained_on(config, broken_base):
    with pytest.raises(UserError, match="the image of 'a photo of a teapot' with seed .* not finite.*VAE"):
        train(dataclasses.replace(config, **broken_base))
    folder = Path(config.output_dir) / "class_images"
    assert not list(folder.glob("*.png"))
    shutil.rmtree(folder)
    train(config)
    whole = (folder / "class-00001.png").read_bytes()
    Image.new("RGB", (32, 32)).save(folder / "class-00001.png")
    with pytest.raises(UserError, match=r"class_images: class-00001.png: black all over.*remove them"):
        train(config)
    (folder / "class-00001.png").unlink()
    train(config)
    assert (folder / "class-00001.png").read_bytes() == whole
