"""Whole runs: every method, every option, and what stops them."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.pipelines.load import load_atoms
from atomdiff.training import dreambooth
from atomdiff.training import run as run_module
from atomdiff.training.dataset import DreamBoothDataset
from atomdiff.training.dreambooth import train
from atomdiff.training.model import build_training_model
from atomdiff.training.noise import ForwardDiffusion
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from tests.helpers import concept_bytes, read_log


def generated(pipe, prompt):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "lora", "oft", "full"])
def test_every_method_goes_through_and_its_concept_loads(config, method, adapter_file, tiny_pipe):
    config = dataclasses.replace(config, adapter=adapter_file(method), learning_rate=0.05)
    written = train(config)
    assert [line["step"] for line in read_log(config)] == [1, 2, 3, 4]
    base = generated(tiny_pipe, "a photo of a mug")
    if method == "full":
        tuned = type(tiny_pipe).from_pretrained(written)
        tuned.set_progress_bar_config(disable=True)
        rows = tuned.text_encoder.get_input_embeddings().weight
        moved = (rows - tiny_pipe.text_encoder.get_input_embeddings().weight).abs().sum(dim=1) > 0
        assert moved.sum() == 1
        tiny_pipe = tuned
    else:
        load_atoms(tiny_pipe, written)
    assert np.abs(generated(tiny_pipe, "a photo of a mug") - base).max() > 1e-3


@pytest.mark.slow
def test_the_loss_goes_down(config):
    config = dataclasses.replace(config, max_train_steps=40, learning_rate=0.05, train_batch_size=4)
    train(config)
    losses = [line["loss"] for line in read_log(config)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


@pytest.mark.slow
def test_the_file_tells_what_was_done(config):
    concept = read_concept_file(train(config))
    assert concept.trigger_phrase == "sks teapot"
    assert list(concept.tokens) == ["sks"] and concept.layers
    assert concept.training["steps"] == 4 and concept.training["seed"] == 0 and concept.training["image_count"] == 3
    assert concept.training["config"] == json.loads(json.dumps(config.snapshot()))
    losses = [line["loss"] for line in read_log(config)]
    assert min(losses) <= concept.training["final_loss"] <= max(losses)
    assert str(Path(config.output_dir).parent) not in json.dumps(concept.training)


@pytest.mark.slow
def test_the_token_starts_as_the_class_word_and_alone_moves(config, tiny_pipe):
    still = dataclasses.replace(config, token_learning_rate=0.0, class_name="red mug")
    words = tiny_pipe.tokenizer("red mug", add_special_tokens=False).input_ids
    expected = tiny_pipe.text_encoder.get_input_embeddings().weight[words].mean(dim=0)
    vector = read_concept_file(train(still)).tokens["sks"]["text_encoder"]
    torch.testing.assert_close(vector, expected, atol=1e-3, rtol=1e-3)
    vector = read_concept_file(train(dataclasses.replace(config, token_learning_rate=0.1))).tokens["sks"][
        "text_encoder"
    ]
    assert (vector - expected).abs().max() > 0.1


@pytest.mark.slow
def test_what_is_not_needed_leaves_memory(config, monkeypatch):
    seen = []

    def look(config, pipe, *rest):
        concept = build_training_model(config, pipe, *rest)
        seen.append((pipe.vae is None, pipe.text_encoder is None, not concept.text_encoders))
        return concept

    monkeypatch.setattr(run_module, "build_training_model", look)
    train(config)
    concept = read_concept_file(train(dataclasses.replace(config, train_token=False)))
    assert seen == [(True, False, False), (True, True, True)]
    assert not concept.tokens and concept.layers


def trained_values(path):
    """All trained parameters of a concept file, in one row."""
    concept = read_concept_file(path)
    deltas = [tensors[kind] for tensors in concept.layers.values() for kind in tensors if kind.endswith("_delta")]
    return torch.cat([tensor.flatten() for tensor in [*deltas, *concept.tokens.get("sks", {}).values()]])


@pytest.mark.slow
def test_same_config_same_bytes(config):
    assert concept_bytes(train(config)) == concept_bytes(train(config))


OPTIONS = {
    "seed": 1,
    "center_crop": True,
    "random_flip": True,
    "prior_loss_weight": 0.5,
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "timestep_sampling": "cubic",
    "min_timestep": 500,
    "max_timestep": 500,
    "max_grad_norm": 0.01,
    "learning_rate": 0.02,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_weight_decay": 0.5,
    "adam_epsilon": 0.1,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 2,
    "train_batch_size": 1,
    "token_learning_rate": 0.1,
    "initializer_token": "red",
    "guidance_scale": 1.0,
}


@pytest.mark.slow
def test_every_option_changes_the_result(config, tmp_path):
    config = dataclasses.replace(
        config,
        with_prior_preservation=True,
        num_class_images=2,
        class_data_dir=None,
        lr_scheduler="constant_with_warmup",
    )
    found = {
        name: trained_values(train(dataclasses.replace(config, output_dir=str(tmp_path / "out"))))
        for name in ("as it is",)
    }
    for name, value in OPTIONS.items():
        folder = str(tmp_path / ("guided" if name == "guidance_scale" else "out"))
        found[name] = trained_values(train(dataclasses.replace(config, output_dir=folder, **{name: value})))
    same = [(one, two) for one, two in itertools.combinations(found, 2) if torch.equal(found[one], found[two])]
    assert not same


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient's norm"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config, where, monkeypatch):
    config = dataclasses.replace(config, checkpointing_steps=1, checkpoints_total_limit=1)
    usual, calls = dreambooth.batch_loss, []

    def broken_loss(run, batch):
        calls.append(1)
        loss = usual(run, batch)
        if len(calls) < 3:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(dreambooth, "batch_loss", broken_loss)
    with pytest.raises(UserError, match=f"step 3: the {where} is (nan|inf); resume from .*checkpoint-2"):
        train(config)
    assert [folder.name for folder in Path(config.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train(dataclasses.replace(config, resume_from_checkpoint="latest", learning_rate=1e-4))


@pytest.mark.slow
def test_accumulated_batches_count_as_one(config, monkeypatch):
    usual = dreambooth.batch_loss
    config = dataclasses.replace(config, max_train_steps=2)
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: usual(run, 0))
    one = read_concept_file(train(config))
    two = read_concept_file(train(dataclasses.replace(config, gradient_accumulation_steps=2)))
    for module, tensors in one.layers.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(tensor, two.layers[module][kind], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_sample_what_one_does_that_accumulates(config, monkeypatch):
    usual, runs = dreambooth.batch_loss, []
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: runs.append(run) or usual(run, number))
    train(dataclasses.replace(config, max_train_steps=1))
    device = torch.device("cpu")
    for number in range(4):
        process = SimpleNamespace(num_processes=2, process_index=number % 2, device=device)
        one, two = usual(runs[0], number), usual(dataclasses.replace(runs[0], accelerator=process), number // 2)
        assert one.item() == two.item()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(config):
    plain = read_concept_file(train(config))
    saving = read_concept_file(train(dataclasses.replace(config, gradient_checkpointing=True)))
    for module, tensors in plain.layers.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(tensor, saving.layers[module][kind], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_learning_rates_follow_the_schedule(config):
    scaled = {"scale_lr": True, "learning_rate": 0.01 / config.instance_images_per_step(processes=1)}
    train(dataclasses.replace(config, lr_scheduler="linear", lr_warmup_steps=2, **scaled))
    np.testing.assert_allclose([line["lr"] for line in read_log(config)], [0, 0.005, 0.01, 0.005])


@pytest.mark.slow
def test_captions_are_the_prompts_of_images(config, teapot_images, monkeypatch):
    (teapot_images / "1.txt").write_text("a photo of sks on the beach")
    prompts = {}
    usual = run_module.build_dataset

    def note(*arguments):
        dataset = usual(*arguments)
        (images,) = dataset.instance_images
        prompts.update({number: dataset.prompts[prompt] for number, (prompt,) in enumerate(images.prompts)})
        return dataset

    monkeypatch.setattr(run_module, "build_dataset", note)
    train(config)
    assert prompts == {0: "a photo of sks teapot", 1: "a photo of sks on the beach", 2: "a photo of sks teapot"}


@pytest.mark.slow
def test_tensorboard(config):
    train(dataclasses.replace(config, report_to="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "logs" / "atomdiff"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"resolution": 30}, "resolution=30: this base needs a multiple of 8"),
        ({"resolution": 128}, "shorter side under 64 pixels: 0.png"),
        ({"adapter": "nowhere.json"}, "adapter='nowhere.json': no such file"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "'no/such/folder' is not a folder or file here"),
        ({"instance_prompt": "a photo of a teapot"}, "trigger_word='sks': no prompt contains it"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "'checkpoint-9': no such checkpoint"),
        ({"report_to": "telegraph"}, "accelerate cannot start: .*telegraph"),
    ],
)
def test_mistakes_are_user_errors(config, fields, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, **fields))


@pytest.mark.slow
def test_every_batch_is_sampled_anew_and_every_image_in_turn(config, teapot_images, recorded):
    for number in range(3):
        (teapot_images / f"{number}.txt").write_text(f"sks {number}")
    batches, noised = recorded(DreamBoothDataset), recorded(ForwardDiffusion)
    train(dataclasses.replace(config, max_train_steps=3, gradient_accumulation_steps=2))
    assert len(batches) == len(noised) == 6
    targets = torch.cat([batch.target for _, batch in noised])
    assert len(targets.flatten(1).unique(dim=0)) == 12
    assert len(torch.cat([batch.timesteps for _, batch in noised]).unique()) > 6
    prompts = [number for _, batch in batches for number in batch.prompts]
    assert all(sorted(prompts[first : first + 3]) == [0, 1, 2] for first in range(0, 12, 3))


def test_full_tuning_in_bf16_keeps_every_bit_that_does_not_learn(config, half_precision, tiny_pipe_folder):
    changes = {"adapter": "full", "mixed_precision": half_precision, "learning_rate": 0.0, "train_token": False}
    with_class = {"with_prior_preservation": True, "num_class_images": 2}
    folder = train(dataclasses.replace(config, max_train_steps=1, **changes, **with_class))
    for part in ("unet", "text_encoder"):
        before, after = (Path(place) / part / "model.safetensors" for place in (tiny_pipe_folder, folder))
        if part == "unet":
            before, after = (file.with_name("diffusion_pytorch_model.safetensors") for file in (before, after))
        tensors = load_file(before)
        tensors |= {f"text_model.{name}": tensor for name, tensor in tensors.items()}  # as transformers 4 calls them
        tensors |= {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(after).items())


def test_a_folder_in_which_another_run_writes_is_refused(config):
    with lock_folder(Path(config.output_dir)):
        with pytest.raises(UserError, match=rf"another run is writing there \(process {os.getpid()} on"):
            train(config)
