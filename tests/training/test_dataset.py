"""What the steps of whole runs are given: buckets, captions, repeats, masks, and the cache of latents."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.data.latents import LatentCache
from atomdiff.data.sampler import sample_order
from atomdiff.training import base_model, dreambooth
from atomdiff.training.dataset import DreamBoothDataset, EncodedImages, build_dataset, encode_images
from atomdiff.training.dreambooth import train
from atomdiff.training.training_images import TrainingImage
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed

SIZES = {"a": (64, 32), "b": (62, 33), "c": (32, 64), "d": (32, 32), "e": (40, 40)}  # width, height


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "teapot"
    (folder / "mask").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{{trigger}} teapot {name}, red, green, blue")
    mask = Image.new("L", SIZES["a"])
    mask.paste(255, (0, 0, 32, 32))
    mask.save(folder / "mask" / "a.png")
    return folder


@pytest.fixture
def config(train_config, image_folder):
    return train_config(instance_data_dir=str(image_folder), max_train_steps=6, num_inference_steps=1)


EVERYTHING = {
    "aspect_ratio_buckets": "32,64;64,32;32,32",
    "shuffle_captions": True,
    "keep_tokens": 1,
    "caption_dropout": 0.4,
    "masked_loss": True,
    "unmasked_weight": 0.1,
    "random_flip": True,
    "with_prior_preservation": True,
    "num_class_images": 2,
}


def trained_values(path):
    """The trained parameters of a concept, as bytes."""
    concept = read_concept_file(path)
    tensors = [tensor for _, layer in sorted(concept.layers.items()) for _, tensor in sorted(layer.items())]
    return b"".join(tensor.numpy().tobytes() for tensor in [*tensors, *concept.tokens["sks"].values()])


@pytest.fixture
def batches(recorded):
    """Every batch that runs sample from now on, with its dataset."""
    return recorded(DreamBoothDataset)


def cached_latents(folder):
    """How many files of a cache hold latents, and not states of prompts."""
    return sum(load_file(file).keys() == {"mean", "std"} for file in folder.iterdir())


def texts(batches):
    return [dataset.prompts[number] for dataset, batch in batches for number in batch.prompts]


@pytest.mark.slow
def test_everything_at_once_in_batches_of_one_size(config, batches):
    config = dataclasses.replace(config, **EVERYTHING, max_train_steps=20)
    train(config)
    shapes = {tuple(batch.latents.shape) for _, batch in batches}
    assert shapes == {(4, 4, 8, 16), (4, 4, 16, 8), (4, 4, 8, 8)}
    dataset, _ = batches[0]
    assert [len(images.prompts) for images in dataset.instance_images] == [2, 1, 2] and dataset.num_instance_images == 5
    for _, batch in batches:
        height, width = batch.latents.shape[-2:]
        assert batch.num_instance_images == 2 and batch.weights.shape == (4, 1, height, width)
        assert batch.time_ids[:, 4:].tolist() == [[4 * height, 4 * width]] * 4
        assert batch.time_ids[2:, :4].tolist() in ([[32, 32, 0, 0]] * 2, [[32, 32, 0, 16]] * 2, [[32, 32, 16, 0]] * 2)
        assert torch.equal(batch.weights[2:], torch.ones(2, 1, height, width))
    prompts = texts(batches)
    assert "" in prompts and 0.2 < prompts.count("") / len(prompts) < 0.6
    of_a = {text for text in prompts if text.startswith("sks teapot a")}
    assert len(of_a) > 2
    assert all(sorted(text.split(", ")) == ["blue", "green", "red", "sks teapot a"] for text in of_a)


@pytest.mark.slow
def test_every_image_comes_equally_often_whatever_the_bucket_is(config, batches):
    train(dataclasses.replace(config, aspect_ratio_buckets="auto", max_train_steps=10, center_crop=True))
    names = [text.split(",")[0][-1] for text in texts(batches)]
    assert sorted(names[:10]) == sorted("aabbccddee") == sorted(names[10:])


@pytest.mark.slow
def test_one_bucket_of_the_resolution_changes_nothing(config):
    squares = dataclasses.replace(config, aspect_ratio_buckets="32,32")
    assert trained_values(train(config)) == trained_values(train(squares))


@pytest.mark.slow
def test_without_buckets_images_come_in_the_plain_order(config, batches):
    train(config)
    seed = derive_seed(config.seed, "photos")
    names = [text.split(",")[0][-1] for text in texts(batches)]
    assert names == ["abcde"[index] for index in sample_order(5, 0, 12, seed)]


@pytest.mark.slow
def test_repeats_balance_subjects(config, tmp_path, image_folder, batches):
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (32, 32), "red").save(few / "one.png")
    entries = [
        {"instance_data_dir": str(image_folder)},
        {"instance_data_dir": str(few), "trigger_word": "robot", "repeats": 5, "instance_prompt": "{trigger}"},
    ]
    (tmp_path / "shelf.yaml").write_text(json.dumps(entries))
    shelf = {"instance_data_dir": None, "concepts_list": str(tmp_path / "shelf.yaml"), "one_file": True}
    train(dataclasses.replace(config, **shelf, max_train_steps=10, train_token=False))
    prompts = texts(batches)
    for epoch in (prompts[:10], prompts[10:]):
        assert epoch.count("robot") == 5 and len(set(epoch)) == 6
    assert batches[0][0].num_instance_images == 6


@pytest.mark.slow
def test_masks_weigh_the_loss_and_turn_with_the_image(config, batches, image_folder):
    for name in "bcde":
        (image_folder / f"{name}.png").unlink()
        (image_folder / f"{name}.txt").unlink(missing_ok=True)
    fields = {"aspect_ratio_buckets": "32,64", "masked_loss": True, "random_flip": True}
    train(dataclasses.replace(config, **fields, unmasked_weight=0.25))
    left = torch.full((1, 8, 16), 0.25)
    left[..., :8] = 1
    weights = torch.cat([batch.weights for _, batch in batches])
    sides = ["left" if torch.equal(w, left) else "right" if torch.equal(w, left.flip(-1)) else "" for w in weights]
    assert set(sides) == {"left", "right"}
    light = torch.zeros(1, 32, 64)
    light[..., :32] = 1
    torch.testing.assert_close(avg_pool2d(light, 4) * 0.75 + 0.25, left)


@pytest.mark.slow
def test_the_loss_is_weighted(config, image_folder):
    losses = {}
    for kind, light in (("none", None), ("white", 255), ("half", 128)):
        for mask in (image_folder / "mask").iterdir():
            mask.unlink()
        if light is not None:
            for name, size in SIZES.items():
                Image.new("L", size, light).save(image_folder / "mask" / f"{name}.png")
        path = train(dataclasses.replace(config, masked_loss=light is not None, max_train_steps=1))
        losses[kind] = read_concept_file(path).training["final_loss"]
    assert losses["white"] == losses["none"]
    assert losses["half"] == pytest.approx(losses["none"] * 128 / 255, rel=1e-5)


@pytest.mark.slow
def test_crops_without_the_subject_are_left_out(config, image_folder, batches):
    for name in "bcde":
        (image_folder / f"{name}.png").unlink()
        (image_folder / f"{name}.txt").unlink(missing_ok=True)
    mask = Image.new("L", SIZES["a"])
    mask.paste(255, (0, 0, 8, 32))
    mask.save(image_folder / "mask" / "a.png")
    masked = dataclasses.replace(config, masked_loss=True)
    train(masked)
    assert {tuple(ids.tolist()) for _, batch in batches for ids in batch.time_ids} == {(32, 64, 0, 0, 32, 32)}
    with pytest.raises(UserError, match="a.png: cut to 32x32, it shows nothing of what its mask marks"):
        train(dataclasses.replace(masked, center_crop=True))


@pytest.mark.slow
def test_a_second_run_reads_its_latents_and_gives_the_same_bytes(config, tmp_path, monkeypatch):
    shared = {"cache_dir": str(tmp_path / "kept"), "class_data_dir": str(tmp_path / "class")}
    config = dataclasses.replace(config, **EVERYTHING, **shared)
    first = trained_values(train(config))
    kept = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}

    def encode(*_):
        raise AssertionError("the VAE was called")

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", encode)
        assert trained_values(train(dataclasses.replace(config, output_dir=str(tmp_path / "second")))) == first
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == kept
    damaged = next((tmp_path / "kept").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.warns(UserWarning, match=f"{damaged.name}: damaged"):
        assert trained_values(train(config)) == first
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == kept
    unkept = dataclasses.replace(config, cache_dir=str(tmp_path / "anew"))
    assert trained_values(train(unkept)) == first


@pytest.mark.slow
def test_latents_are_kept_in_the_output_folder(config):
    train(config)
    assert cached_latents(Path(config.output_dir) / "cache") == len(SIZES)


@pytest.mark.slow
def test_a_run_with_everything_goes_on_with_the_same_bytes(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, **EVERYTHING, class_data_dir=str(tmp_path / "class"), checkpointing_steps=3)
    whole = trained_values(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch:
        patch.setattr(dreambooth, "save_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert trained_values(train(dataclasses.replace(config, resume_from_checkpoint="checkpoint-3"))) == whole


@pytest.mark.slow
def test_sdxl_takes_sizes_and_crops(config, tiny_xl_pipe_folder, monkeypatch):
    forward, time_ids = UNet2DConditionModel.forward, []

    def note(self, *arguments, **options):
        time_ids.append(options["added_cond_kwargs"]["time_ids"])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", note)
    base = {"pretrained_model_name_or_path": str(tiny_xl_pipe_folder)}
    train(dataclasses.replace(config, **base, aspect_ratio_buckets="32,64;64,32;32,32", max_train_steps=15))
    found = {tuple(ids.tolist()) for batch in time_ids for ids in batch}
    assert found == {
        (32, 64, 0, 0, 32, 64),
        (64, 32, 0, 0, 64, 32),
        (32, 32, 0, 0, 32, 32),
        (40, 40, 0, 0, 32, 32),
        (33, 62, 0, 0, 32, 64),
        (33, 62, 1, 0, 32, 64),
        (33, 62, 2, 0, 32, 64),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aspect_ratio_buckets": "32,36"}, "this base needs multiples of 8; found 32,36"),
        (
            {"aspect_ratio_buckets": "64,128"},
            "less than half as large as their bucket: b.png .62x33 for 128x64., c.png",
        ),
    ],
)
def test_mistakes_are_user_errors(config, fields, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, **fields))


def test_a_word_that_no_caption_names_is_found_although_captions_drop_out(config, image_folder):
    for name in SIZES:
        (image_folder / f"{name}.txt").write_text("a teapot, red")
    with pytest.raises(UserError, match="trigger_word='sks': no prompt contains it"):
        train(dataclasses.replace(config, caption_dropout=0.5, shuffle_captions=True))


def test_words_that_the_base_cannot_learn_are_found_before_class_images_are_generated(config, tmp_path):
    classes = tmp_path / "classes"
    fields = {"with_prior_preservation": True, "num_class_images": 1, "class_data_dir": str(classes)}
    with pytest.raises(UserError, match="'tea' cannot be a trigger word"):
        train(dataclasses.replace(config, trigger_word="tea", **fields))
    assert not classes.exists()


@pytest.mark.slow
def test_captions_may_spell_a_word_in_another_case(config, image_folder):
    trained = []
    for spelt in ("sks", "Sks"):
        for name in SIZES:
            (image_folder / f"{name}.txt").write_text(f"a {spelt} teapot")
        path = train(dataclasses.replace(config, num_vectors=2))
        trained.append(read_concept_file(path).tokens)
    for word in ("sks", "sks_1"):
        assert torch.equal(trained[0][word]["text_encoder"], trained[1][word]["text_encoder"])


def test_masked_loss_needs_a_mask(config, image_folder):
    (image_folder / "mask" / "a.png").unlink()
    with pytest.raises(UserError, match="no image that is trained on has a mask; expected masks in .*mask, named like"):
        train(dataclasses.replace(config, masked_loss=True))


def dataset_of(orders, dropout, preserved=None):
    """Four images of one crop each, whose prompts are those of `orders`."""
    random = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 4, 4, 8, 8, generator=random)
    cache = LatentCache(mean, std, torch.zeros(4, 6), None, tuple(range(5)))
    images = (EncodedImages(cache, orders, tuple(range(4))),)
    return DreamBoothDataset(tuple("abcd") + ("",), images, None, dropout, preserved or {})


def test_without_choices_nothing_more_is_sampled():
    dataset = dataset_of(((0,), (1,), (2,), (3,)), dropout=0.0)
    generator, plain = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    batch = dataset.sample(3, 4, 0, generator)
    order = sample_order(4, 12, 4, derive_seed(0, "photos"))
    cache = dataset.instance_images[0].latents
    torch.rand(4, generator=plain)
    noise = torch.randn(4, 4, 8, 8, generator=plain)
    assert torch.equal(batch.latents, cache.mean[order] + cache.std[order] * noise)
    assert batch.prompts == order and batch.weights is None and batch.preservation_prompts == []
    assert torch.equal(generator.get_state(), plain.get_state())


def test_orders_of_tags_and_dropouts_are_sampled_as_often_as_they_should():
    dataset = dataset_of(((0, 1), (0, 1), (0, 1), (2,)), dropout=0.25)
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt for number in range(500) for prompt in dataset.sample(number, 4, 0, generator).prompts]
    share = torch.bincount(torch.tensor(prompts), minlength=5) / len(prompts)
    expected = torch.tensor([0.75 * 3 / 8, 0.75 * 3 / 8, 0.75 / 4, 0, 0.25])
    torch.testing.assert_close(share, expected, atol=0.04, rtol=0)


def test_the_prompts_that_stay_are_those_of_the_captions_dropped_or_not():
    orders, preserved = ((0, 1), (0, 1), (1,), (0,)), {0: 2, 1: 3}
    dataset = dataset_of(orders, 0.5, preserved)
    dropped = 0
    for number in range(20):
        generator = torch.Generator().manual_seed(number)
        batch = dataset.sample(number, 3, 0, generator)
        kept = dataset_of(orders, 0.0, preserved).sample(number, 3, 0, torch.Generator().manual_seed(number))
        assert batch.preservation_prompts == [preserved[prompt] for prompt in kept.prompts]
        dropped += batch.prompts.count(4)
    assert 15 < dropped < 45


def test_class_images_are_not_preserved_twice():
    images = dataset_of(((0,), (0,), (1,), (1,)), 0.0, {0: 2, 1: 2})
    dataset = dataclasses.replace(images, class_images=images.instance_images)
    batch = dataset.sample(0, 2, 0, torch.Generator())
    assert len(batch.prompts) == 4 and batch.preservation_prompts == [2, 2]


def test_a_process_encodes_its_share_before_it_waits_for_the_others():
    log = []
    images = [TrainingImage((), lambda size, number=number: [number]) for number in range(5)]

    def encoder(crops):
        log.append(crops[0])
        return LatentCache(*torch.zeros(2, 1, 4, 8, 8), torch.zeros(1, 6), None, (0, 1))

    def accelerator(processes):
        wait = partial(log.append, "wait")
        process = {"num_processes": processes, "process_index": processes - 1, "is_main_process": processes == 1}
        return SimpleNamespace(**process, wait_for_everyone=wait)

    assert len(encode_images(encoder, images, (8, 8), accelerator(2))) == 5
    assert log == [1, 3, "wait", 0, 1, 2, 3, 4]
    log.clear()
    encode_images(encoder, images, (8, 8), accelerator(1))
    assert log == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_processes_encode_their_shares_and_train_in_step(config, tmp_path):
    fields = {**dataclasses.asdict(config), **EVERYTHING, "validation_prompts": ["{trigger}"], "max_train_steps": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    script = tmp_path / "run.py"
    script.write_text("from atomdiff.training import dreambooth\ndreambooth.train(dreambooth.load_config())\n")
    root = Path(__file__).parents[2]
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(script), "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert cached_latents(tmp_path / "out" / "cache") == len(SIZES) + 3 * 2  # a class image for every bucket


@pytest.mark.parametrize("sliced_from", [31, 32])
def test_large_images_go_through_the_vae_one_by_one(config, tiny_pipe, sliced_from, monkeypatch):
    monkeypatch.setattr("atomdiff.sampling.generate._SLICED_FROM", sliced_from)
    vae = tiny_pipe.vae
    base_model.generate_images(config, tiny_pipe, 32, ["a mug"], [0])
    assert vae.use_slicing == (sliced_from < 32)
    vae.disable_slicing()
    build_dataset(config, tiny_pipe, Accelerator(cpu=True), {})
    assert vae.use_slicing == (sliced_from < 32)
