"""What the validation loss of a run is measured on, and that measuring changes nothing."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.data.latents import LatentCache
from atomdiff.training import dreambooth
from atomdiff.training.config import Subject
from atomdiff.training.config.objective import ObjectiveConfig
from atomdiff.training.dataset import DreamBoothDataset, EncodedImages
from atomdiff.training.dreambooth import train
from atomdiff.training.noise import forward_diffusion
from atomdiff.training.objective import sample_losses
from atomdiff.training.training_images import choose_held_out
from atomdiff.training.validation_loss import fixed_batches
from atomdiff.utils.errors import UserError
from tests.helpers import concept_bytes, embed, read_measurements, write_images

EVERYTHING = {
    "aspect_ratio_buckets": "32,32;32,48",
    "masked_loss": True,
    "unmasked_weight": 0.1,
    "preservation": "class",
    "train_text_encoder": True,
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
    "caption_dropout": 0.2,
    "gradient_checkpointing": True,
}
VARIANTS = {
    "atoms": {},
    "atoms, all options": EVERYTHING,
    "lora": EVERYTHING,
    "full": EVERYTHING | {"text_encoder_adapter": "full"},
    "full without copy": {"use_ema": True},
    "atoms, schedule-free": {"optimizer": "adamw_schedulefree"},
    "atoms, frozen token": {"train_text_encoder_ti_frac": 0.5},
}


@pytest.fixture
def config(train_config, tmp_path, teapot_images):
    """A run of four steps with two more images, measured before the first step and after every second; one has a mask.

    As half of the images fall into another bucket than the others, one of the held-out images does.
    """
    more = write_images(tmp_path / "more", widths=(32, 48), seed=1)
    for folder in (teapot_images, more):
        (folder / "mask").mkdir()
        Image.linear_gradient("L").resize((32, 32)).save(folder / "mask" / "0.png")
    fields = {"validation_loss_steps": 2, "validation_data_dir": str(more)}
    return train_config(max_train_steps=4, learning_rate=0.05, train_batch_size=3, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_measuring_does_not_touch_the_training(config, variant, adapter_file):
    method = variant.split()[0].rstrip(",")
    config = dataclasses.replace(config, adapter=adapter_file(method), **VARIANTS[variant])
    measured = concept_bytes(train(config))
    lines = read_measurements(config)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["base_drift"] == pytest.approx(0, abs=1e-10) and lines[1]["base_drift"] > 1e-8
    for name in ("validation_loss", "training_images_loss"):
        assert len({line[name] for line in lines}) == 3
    assert set(lines[0]["base_drift_by_prompt"]) > {"a photo of a teapot", ""}
    unmeasured = dataclasses.replace(config, validation_loss_steps=0, validation_data_dir=None)
    assert concept_bytes(train(unmeasured)) == measured
    assert not (Path(config.output_dir) / "validation_log.jsonl").exists()


@pytest.mark.slow
def test_sdxl_is_measured_with_its_sizes_and_pooled_embeddings(config, tiny_xl_pipe_folder):
    fields = {"pretrained_model_name_or_path": str(tiny_xl_pipe_folder), "train_text_encoder": True}
    config = dataclasses.replace(config, aspect_ratio_buckets="32,32;32,48", **fields)
    measured = concept_bytes(train(config))
    assert len({line["validation_loss"] for line in read_measurements(config)}) == 3
    assert (
        concept_bytes(train(dataclasses.replace(config, validation_loss_steps=0, validation_data_dir=None))) == measured
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_ema": True, "ema_decay": 0.9},
        {"use_ema": True, "ema_decay": 0.9, "train_text_encoder_ti_frac": 0.75, "token_learning_rate": 3.0},
        {"optimizer": "adamw_schedulefree"},
        {"masked_loss": True, "snr_gamma": 5.0},
    ],
    ids=["last", "ema", "ema of a frozen token", "schedule-free", "weights"],
)
def test_the_loss_is_that_of_the_saved_file(config, fields, tiny_pipe, monkeypatch):
    config = dataclasses.replace(config, **fields)
    runs, usual = [], dreambooth.save_result
    monkeypatch.setattr(dreambooth, "save_result", lambda run, *rest: runs.append(run) or usual(run, *rest))
    atomdiff.load_atoms(tiny_pipe, train(config))
    ((samples, prompts),) = [(run.measurements.samples, run.dataset.prompts) for run in runs]
    losses = []
    for batch in samples.losses["validation_loss"]:
        states = torch.cat([embed(tiny_pipe, prompts[prompt]) for prompt in batch.prompts])
        with torch.no_grad():
            prediction = tiny_pipe.unet(batch.noisy.latents, batch.noisy.timesteps, states).sample
        losses += (sample_losses(prediction, batch.noisy.target, batch.mask) * batch.noisy.weights).tolist()
    assert len(losses) == 16
    before, last = (read_measurements(config)[number]["validation_loss"] for number in (1, 2))
    assert last == pytest.approx(sum(losses) / 16, rel=2e-4) and last != pytest.approx(before, rel=2e-3)


@pytest.mark.slow
def test_held_out_images_are_never_trained_on(config, recorded):
    batches, samples = recorded(DreamBoothDataset), recorded(LatentCache)
    whole = dataclasses.replace(config, validation_data_dir=None, max_train_steps=12, train_batch_size=2)
    training = read_concept_file(train(dataclasses.replace(whole, validation_split=0.4))).training
    assert training["image_count"] == 2
    dataset = batches[0][0]
    (held_out,) = [image[1] for image in dataset.fingerprint["held_out_images"]]
    known = {image[1] for image in dataset.fingerprint["instance_images"]}
    assert held_out not in known and len(known) == 2
    (instance,), (left_out,) = dataset.instance_images, dataset.held_out_images
    assert (len(instance.latents), len(left_out.latents)) == (2, 1)
    assert len(batches) == 12 and len({id(cache) for cache, _ in samples}) == 2
    assert sum(cache is left_out.latents for cache, _ in samples) == 16  # which the losses are measured on, 8 of others
    assert sum(cache is instance.latents for cache, _ in samples) == 8 + 2 * len(dataset.other_prompts) + 12


def test_the_seed_chooses_what_is_held_out():
    subject = Subject(instance_data_dir="photos/mug")
    chosen = [choose_held_out(5, 0.3, seed, subject) for seed in range(9)]
    assert chosen == [choose_held_out(5, 0.3, seed, subject) for seed in range(9)]
    assert {len(each) for each in chosen} == {2} and set.union(*chosen) == set(range(5))
    assert [len(choose_held_out(count, 0.2, 0, subject)) for count in (2, 5, 12, 13)] == [1, 1, 2, 3]
    assert choose_held_out(1, 0.0, 0, subject) == set()


@pytest.mark.parametrize(("count", "split", "held_out"), [(1, 0.1, 1), (2, 0.9, 2)])
def test_a_split_leaves_images_to_train_on(count, split, held_out):
    told = f"validation_split={split}: found {count} in photos/mug, of which {held_out} would be held out; add images"
    with pytest.raises(UserError, match=re.escape(told)):
        choose_held_out(count, split, 0, Subject(instance_data_dir="photos/mug"))


def encoded(count, first=0, side=8, prompts=2):
    """Images whose latents are their number all over."""
    mean = torch.arange(first, first + count, dtype=torch.float32)[:, None, None, None].expand(-1, 4, side, side)
    cache = LatentCache(mean, torch.zeros_like(mean), torch.zeros(count, 6), None, tuple(range(count + 1)))
    return EncodedImages(cache, tuple((image, 99) for image in range(first, first + count)), tuple(range(count)))


@pytest.mark.parametrize(("counts", "images"), [((3,), 3), ((2, 3), 5), ((40,), 16), ((30, 10), 16)])
def test_images_take_turns_at_timesteps_that_are_spread_evenly(tiny_sd2_pipe, counts, images):
    diffusion = forward_diffusion(ObjectiveConfig(), tiny_sd2_pipe)
    buckets = [encoded(count, first, 8 + first) for count, first in zip(counts, (0, 30), strict=False)]
    batches = fixed_batches(buckets, 16, diffusion, batch_size=3)
    assert all(0 < len(batch.prompts) <= 3 for batch in batches)
    timesteps = torch.cat([batch.noisy.timesteps for batch in batches])
    assert sorted(timesteps.tolist()) == [1000 * (2 * number + 1) // 32 for number in range(16)]
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    assert len(set(prompts)) == images and 99 not in prompts
    counted = [prompts.count(prompt) for prompt in set(prompts)]
    assert max(counted) - min(counted) <= 1
    for batch in batches:  # each sample is of the image whose prompt it has
        alpha, sigma = (values[batch.noisy.timesteps.long()][:, None, None, None] for values in diffusion.schedule[:2])
        clean = alpha * batch.noisy.latents - sigma * batch.noisy.target
        torch.testing.assert_close(clean.mean(dim=(1, 2, 3)), torch.tensor(batch.prompts).float(), atol=1e-3, rtol=1e-3)


def test_noise_depends_neither_on_the_batch_size_nor_on_other_random_numbers(tiny_pipe):
    diffusion = forward_diffusion(ObjectiveConfig(noise_offset=0.1), tiny_pipe)
    found = []
    for size in (1, 5, 16):
        torch.manual_seed(size)
        batches = fixed_batches([encoded(3)], 16, diffusion, size, prompt=7)
        assert {prompt for batch in batches for prompt in batch.prompts} == {7}
        found.append(torch.cat([batch.noisy.latents for batch in batches]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(found[0].flatten(1).unique(dim=0)) == 16


@pytest.mark.slow
def test_subjects_of_one_file_each_hold_out_their_own(config, tmp_path, recorded):
    batches, entries = recorded(DreamBoothDataset), []
    for word, name in (("sks", "mug"), ("zwx", "robot")):
        folder = write_images(tmp_path / "two" / name, widths=(32,) * 4, seed=len(name))
        entries.append({"instance_data_dir": str(folder), "class_name": name, "trigger_word": word})
    entries[1]["validation_data_dir"] = config.validation_data_dir
    file = tmp_path / "list.json"
    file.write_text(json.dumps(entries))
    several = {"concepts_list": str(file), "one_file": True, "instance_data_dir": None, "validation_data_dir": None}
    train(dataclasses.replace(config, **several))
    dataset = batches[0][0]
    assert dataset.num_instance_images == 8
    names = {dataset.prompts[number] for images in dataset.held_out_images for (number,) in images.prompts}
    assert names == {"a photo of zwx robot"}
    (last,) = read_measurements(config)[-1:]
    assert list(last["base_drift_by_prompt"])[:2] == ["a photo of a mug", "a photo of a robot"]
    del entries[1]["validation_data_dir"]
    file.write_text(json.dumps(entries))
    batches.clear()
    train(dataclasses.replace(config, **several, validation_split=0.25))
    dataset = batches[0][0]
    names = [dataset.prompts[number] for images in dataset.held_out_images for (number,) in images.prompts]
    assert sorted(names) == ["a photo of sks mug", "a photo of zwx robot"] and dataset.num_instance_images == 6
