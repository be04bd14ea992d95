import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atomdiff.concepts.concept_file import read_delta_file
from atomdiff.pipelines.load import load_atoms
from atomdiff.training import class_images, contact_sheet, dreambooth, saving, validation
from atomdiff.training import run as run_module
from atomdiff.training.dataset import DreamBoothDataset
from atomdiff.training.dreambooth import train
from atomdiff.training.model import build_training_model
from atomdiff.training.noise import ForwardDiffusion
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
METHODS = {
    "atoms": {"peft_type": "ATOMS", "channel_block": 2},
    "lora": {"peft_type": "LORA", "r": 2, "lora_dropout": 0.2, "target_modules": ATTENTION},
    "oft": {"peft_type": "OFT", "oft_block_size": 8, "target_modules": ATTENTION},
    "full": {"peft_type": "FULL"},
}


@pytest.fixture
def config(train_config):
    return train_config(max_train_steps=4)


def adapter_file(tmp_path, method):
    file = tmp_path / f"{method}.json"
    file.write_text(json.dumps(METHODS[method]))
    return str(file)


def contents(path):
    """The bytes of a concept, be it a file or a folder, but for the date."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    dated = re.compile(rb'"modelspec.date":"[^"]*"')
    return {file.name: dated.sub(b"", file.read_bytes()) for file in files if file.is_file()}


def log_of(config):
    return [json.loads(line) for line in (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()]


def recorded(monkeypatch, kind, name="sample"):
    """Record what every call of this method of a class gives, with the object it is called on."""
    method, found = getattr(kind, name), []

    def note(self, *arguments):
        found.append((self, method(self, *arguments)))
        return found[-1][1]

    monkeypatch.setattr(kind, name, note)
    return found


def picture(pipe, prompt):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_through_and_its_concept_loads(config, method, tmp_path, tiny_pipe):
    config = dataclasses.replace(config, adapter=adapter_file(tmp_path, method), learning_rate=0.05)
    written = train(config)
    assert [line["step"] for line in log_of(config)] == [1, 2, 3, 4]
    base = picture(tiny_pipe, "a photo of a mug")
    if method == "full":
        tuned = type(tiny_pipe).from_pretrained(written)
        tuned.set_progress_bar_config(disable=True)
        rows = tuned.text_encoder.get_input_embeddings().weight
        moved = (rows - tiny_pipe.text_encoder.get_input_embeddings().weight).abs().sum(dim=1) > 0
        assert moved.sum() == 1
        tiny_pipe = tuned
    else:
        load_atoms(tiny_pipe, written)
    assert np.abs(picture(tiny_pipe, "a photo of a mug") - base).max() > 1e-3


@pytest.mark.slow
def test_the_loss_goes_down(config):
    config = dataclasses.replace(config, max_train_steps=40, learning_rate=0.05, train_batch_size=4)
    train(config)
    losses = [line["loss"] for line in log_of(config)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_the_file_tells_what_was_done(config):
    concept = read_delta_file(train(config))
    assert concept.trigger_phrase == "sks teapot"
    assert list(concept.tokens) == ["sks"] and concept.layers
    assert concept.training["steps"] == 4 and concept.training["seed"] == 0 and concept.training["image_count"] == 3
    assert concept.training["config"] == json.loads(json.dumps(config.snapshot()))
    losses = [line["loss"] for line in log_of(config)]
    assert min(losses) <= concept.training["final_loss"] <= max(losses)
    assert str(Path(config.output_dir).parent) not in json.dumps(concept.training)


def test_the_token_starts_as_the_class_word_and_alone_moves(config, tiny_pipe):
    still = dataclasses.replace(config, token_learning_rate=0.0, class_name="red mug")
    words = tiny_pipe.tokenizer("red mug", add_special_tokens=False).input_ids
    expected = tiny_pipe.text_encoder.get_input_embeddings().weight[words].mean(dim=0)
    vector = read_delta_file(train(still)).tokens["sks"]["text_encoder"]
    torch.testing.assert_close(vector, expected, atol=1e-3, rtol=1e-3)
    vector = read_delta_file(train(dataclasses.replace(config, token_learning_rate=0.1))).tokens["sks"]["text_encoder"]
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
    concept = read_delta_file(train(dataclasses.replace(config, train_token=False)))
    assert seen == [(True, False, False), (True, True, True)]
    assert not concept.tokens and concept.layers


def numbers(path):
    """All trained numbers of a concept file, in one row."""
    concept = read_delta_file(path)
    deltas = [tensors[kind] for tensors in concept.layers.values() for kind in tensors if kind.endswith("_delta")]
    return torch.cat([tensor.flatten() for tensor in [*deltas, *concept.tokens.get("sks", {}).values()]])


@pytest.mark.slow
def test_same_config_same_bytes(config):
    assert contents(train(config)) == contents(train(config))


KNOBS = {
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
def test_every_knob_turns_something(config, tmp_path):
    config = dataclasses.replace(
        config,
        with_prior_preservation=True,
        num_class_images=2,
        class_data_dir=None,
        lr_scheduler="constant_with_warmup",
    )
    found = {
        name: numbers(train(dataclasses.replace(config, output_dir=str(tmp_path / "out")))) for name in ("as it is",)
    }
    for name, value in KNOBS.items():
        folder = str(tmp_path / ("guided" if name == "guidance_scale" else "out"))
        found[name] = numbers(train(dataclasses.replace(config, output_dir=folder, **{name: value})))
    same = [(one, two) for one, two in itertools.combinations(found, 2) if torch.equal(found[one], found[two])]
    assert not same


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_a_run_that_was_asked_to_stop_ends_with_the_same_bytes(config, method, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        config, adapter=adapter_file(tmp_path, method), lr_scheduler="cosine", gradient_accumulation_steps=2
    )
    expected = contents(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))

    def interrupt(self, step, *values):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.RunLog, "step", interrupt)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-2 is saved: .*--resume_from_checkpoint latest"):
            train(config)
    assert contents(train(dataclasses.replace(config, resume_from_checkpoint="latest"))) == expected
    assert [line["step"] for line in log_of(config)] == [3, 4]


KILLED = """
import os, signal, sys
from atomdiff.training import dreambooth

def die(self, step, *values):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

dreambooth.RunLog.step = die
dreambooth.train(dreambooth.load_config(["--config", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(config, half_precision, tmp_path):
    config = dataclasses.replace(
        config,
        max_train_steps=7,
        checkpointing_steps=2,
        with_prior_preservation=True,
        num_class_images=3,
        class_data_dir=str(tmp_path / "class"),
        mixed_precision=half_precision,
    )
    fields = {**dataclasses.asdict(config), "validation_prompts": list(config.validation_prompts)}
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    root, threads = Path(__file__).parents[2], str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": threads}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.yaml")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    left = (".lock", "training_log.jsonl")
    assert sorted(file.name for file in Path(config.output_dir).iterdir() if file.name not in left) == [
        "cache",
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = contents(train(dataclasses.replace(config, resume_from_checkpoint="latest")))
    assert contents(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))) == resumed


@pytest.mark.slow
def test_a_checkpoint_becomes_a_concept_by_stopping_there(config, tmp_path):
    config = dataclasses.replace(config, checkpointing_steps=2)
    train(config)
    there = dataclasses.replace(config, resume_from_checkpoint="checkpoint-2", max_train_steps=2)
    short = dataclasses.replace(config, output_dir=str(tmp_path / "short"), max_train_steps=2)
    early, alike = train(there), train(short)
    told = [read_delta_file(file).training for file in (early, alike)]
    assert [each["config"].pop("max_train_steps") for each in told] == [4, 2]  # those of the run that it learned in
    assert told[0] == told[1] and told[0]["steps"] == 2
    one, other = load_file(early), load_file(alike)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", ["loss", "gradient's norm"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config, where, monkeypatch):
    config = dataclasses.replace(config, checkpointing_steps=1, checkpoints_total_limit=1)
    usual, calls = dreambooth.batch_loss, []

    def spoilt(run, batch):
        calls.append(1)
        loss = usual(run, batch)
        if len(calls) < 3:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(dreambooth, "batch_loss", spoilt)
    with pytest.raises(UserError, match=f"step 3: the {where} is (nan|inf); go on from .*checkpoint-2"):
        train(config)
    assert [folder.name for folder in Path(config.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train(dataclasses.replace(config, resume_from_checkpoint="latest", learning_rate=1e-4))


def test_accumulated_batches_count_as_one(config, monkeypatch):
    usual = dreambooth.batch_loss
    config = dataclasses.replace(config, max_train_steps=2)
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: usual(run, 0))
    one = read_delta_file(train(config))
    two = read_delta_file(train(dataclasses.replace(config, gradient_accumulation_steps=2)))
    for module, tensors in one.layers.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(tensor, two.layers[module][kind], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_processes_may_change_if_the_batches_of_a_step_do_not(config, tmp_path):
    one = dataclasses.replace(config, checkpointing_steps=2, gradient_accumulation_steps=2)
    expected = contents(train(one))
    file = Path(config.output_dir) / "checkpoint-2" / "run.json"
    record = json.loads(file.read_text())
    assert record["config"]["num_processes"] == 1
    record["config"] |= {"num_processes": 2, "gradient_accumulation_steps": 1}
    file.write_text(json.dumps(record))
    assert contents(train(dataclasses.replace(one, resume_from_checkpoint="checkpoint-2"))) == expected
    other = dataclasses.replace(one, resume_from_checkpoint="checkpoint-2", gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="gradient_accumulation_steps=1 on 2 .*, now .*=1 on 1 .*take .*steps=2"):
        train(other)


def test_two_processes_draw_what_one_does_that_accumulates(config, monkeypatch):
    usual, runs = dreambooth.batch_loss, []
    monkeypatch.setattr(dreambooth, "batch_loss", lambda run, number: runs.append(run) or usual(run, number))
    train(dataclasses.replace(config, max_train_steps=1))
    device = torch.device("cpu")
    for number in range(4):
        process = SimpleNamespace(num_processes=2, process_index=number % 2, device=device)
        one, two = usual(runs[0], number), usual(dataclasses.replace(runs[0], accelerator=process), number // 2)
        assert one.item() == two.item()


def test_gradient_checkpointing_changes_nothing_but_memory(config):
    plain = read_delta_file(train(config))
    saving = read_delta_file(train(dataclasses.replace(config, gradient_checkpointing=True)))
    for module, tensors in plain.layers.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(tensor, saving.layers[module][kind], atol=1e-4, rtol=1e-3)


def test_learning_rates_follow_the_schedule(config):
    train(dataclasses.replace(config, lr_scheduler="linear", lr_warmup_steps=2, learning_rate=0.01))
    np.testing.assert_allclose([line["lr"] for line in log_of(config)], [0, 0.005, 0.01, 0.005])


@pytest.mark.slow
def test_class_images_are_generated_once_and_trained_on(config, monkeypatch):
    config = dataclasses.replace(config, with_prior_preservation=True, num_class_images=3)
    drawn = []
    draw, batches = class_images.generate_images, recorded(monkeypatch, DreamBoothDataset)

    def note(config, pipe, prompts, seeds):
        drawn.append((prompts, list(seeds)))
        return draw(config, pipe, prompts, seeds)

    monkeypatch.setattr(class_images, "generate_images", note)
    for _ in range(2):
        train(config)
    ((prompts, seeds),) = drawn
    assert prompts == ["a photo of a teapot"] * 3 and len(set(seeds)) == 3
    dataset, batch = batches[0]
    assert len(list((Path(config.output_dir) / "class_images").glob("*.png"))) == 3
    assert batch.latents.shape == (4, 4, 8, 8) and batch.num_instance_images == 2
    prompts = [dataset.prompts[number] for number in batch.prompts]
    assert prompts == ["a photo of sks teapot"] * 2 + ["a photo of a teapot"] * 2


@pytest.mark.slow
def test_class_images_of_another_base_are_refused(config, tiny_pipe, tmp_path):
    config = dataclasses.replace(config, with_prior_preservation=True, num_class_images=2, max_train_steps=1)
    train(config)
    tiny_pipe.unet.up_blocks[0].resnets[0].conv1.weight.data[1, 2] += 1e-3  # a little, far from conv_out
    tiny_pipe.save_pretrained(tmp_path / "tuned")
    tuned = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "tuned"))
    with pytest.raises(UserError, match=r"made with other settings \(unet '.*', now '[^;]*'\)\. .*class_images.json"):
        train(tuned)
    record = Path(config.output_dir) / "class_images" / "class_images.json"
    then = json.loads(record.read_text())
    record.write_text(json.dumps({"prompt": then["prompt"], "base": "0123456789abcdef"}))  # as it was once
    with pytest.raises(UserError, match="base '0123456789abcdef', now not noted; .*unet not noted, now '[0-9a-f]{16}'"):
        train(config)
    record.unlink()
    train(config)
    assert json.loads(record.read_text()) == then


def test_class_images_are_told_by_the_scheduler_and_not_by_what_is_written_out(config):
    config = dataclasses.replace(config, with_prior_preservation=True, num_class_images=1, max_train_steps=1)
    train(config)
    train(dataclasses.replace(config, prediction_type="v_prediction", rescale_betas_zero_snr=False))  # as it is
    for changes in ({"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}, {"prediction_type": "flow"}):
        with pytest.raises(UserError, match=r"made with other settings \(scheduler '\w+', now '\w+'\)"):
            train(dataclasses.replace(config, **changes))


def test_captions_are_the_photos_prompts(config, teapot_images, monkeypatch):
    (teapot_images / "1.txt").write_text("a picture of sks on the beach")
    prompts = {}
    usual = run_module.build_dataset

    def note(*arguments):
        dataset = usual(*arguments)
        (photos,) = dataset.instance_images
        prompts.update({number: dataset.prompts[prompt] for number, (prompt,) in enumerate(photos.prompts)})
        return dataset

    monkeypatch.setattr(run_module, "build_dataset", note)
    train(config)
    assert prompts == {0: "a photo of sks teapot", 1: "a picture of sks on the beach", 2: "a photo of sks teapot"}


def test_the_contact_sheet_has_a_row_every_few_steps(config):
    train(dataclasses.replace(config, validation_steps=3, validation_prompts=("{trigger_word}", "a {class_name}")))
    files = sorted(file.name for file in (Path(config.output_dir) / "validation").iterdir())
    assert files == [f"step-{step:06d}-{column:02d}.png" for step in (0, 3, 4) for column in (0, 1)]
    sheet = Image.open(Path(config.output_dir) / "contact_sheet.png")
    assert sheet.height > 3 * 32


def shown(config):
    """The pictures of the contact sheet and the sheet."""
    folder = Path(config.output_dir)
    return {file.name: file.read_bytes() for file in [*folder.glob("validation/*"), folder / "contact_sheet.png"]}


@pytest.mark.parametrize(
    ("step", "unwritten", "fields"),
    [
        (2, "contact_sheet.png", {}),
        (2, "step-000002-00.png", {"use_ema": True}),
        (2, "step-000002-01.png", {"optimizer": "adamw_schedulefree"}),
        (4, "contact_sheet.png", {}),
    ],
)
def test_a_row_that_a_stopped_run_owes_is_drawn_when_it_goes_on(config, step, unwritten, fields, tmp_path, monkeypatch):
    prompts = ("{trigger_word}", "a {class_name}")
    fields = {"validation_steps": 2, "validation_prompts": prompts, "checkpointing_steps": 2, **fields}
    config = dataclasses.replace(config, learning_rate=0.05, **fields)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    usual, steps = contact_sheet.write_png, []
    extend = validation.extend_contact_sheet

    def note(folder, step, *rest):
        steps.append(step)
        extend(folder, step, *rest)

    def die(file, picture):
        if steps[-1] == step and file.name == unwritten:
            raise RuntimeError("died")
        usual(file, picture)

    monkeypatch.setattr(validation, "extend_contact_sheet", note)
    with monkeypatch.context() as patch:
        patch.setattr(contact_sheet, "write_png", die)
        with pytest.raises(RuntimeError, match="died"):
            train(config)
    assert shown(config) != shown(whole)
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest")
    train(resumed)
    assert shown(config) == shown(whole)
    steps.clear()
    train(resumed)
    assert not steps  # nothing is owed


def test_a_run_goes_on_with_more_or_fewer_prompts_on_its_sheet(config):
    config = dataclasses.replace(config, checkpointing_steps=2, validation_steps=2)
    expected = contents(train(config))
    for prompts in (("a {class_name}", "{trigger_word}"), ("a {class_name}",)):
        fields = {"resume_from_checkpoint": "checkpoint-2", "validation_prompts": prompts}
        assert contents(train(dataclasses.replace(config, **fields))) == expected


def test_a_last_row_that_cannot_be_drawn_does_not_cost_the_concept(config, monkeypatch):
    config = dataclasses.replace(config, validation_steps=4)
    draw = dreambooth.validate

    def fail(run, step):
        if step == config.max_train_steps:
            raise RuntimeError("out of memory")
        draw(run, step)

    monkeypatch.setattr(dreambooth, "validate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    assert read_delta_file(Path(config.output_dir) / "teapot.atoms.safetensors").training["steps"] == 4


def test_a_row_that_cannot_be_written_is_warned_of(config, monkeypatch):
    def fail(file, picture):
        raise OSError("no space left")

    monkeypatch.setattr(contact_sheet, "write_png", fail)
    with pytest.warns(UserWarning, match=r"step [04]: the contact sheet cannot be written \(no space left\)"):
        train(dataclasses.replace(config, validation_steps=4))


def test_a_run_that_was_asked_to_stop_at_a_row_draws_it_later(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, validation_steps=2)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(
            dreambooth.RunLog, "step", lambda self, step, *_: signal.raise_signal(signal.SIGINT) if step == 2 else None
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert shown(config) == shown(whole)


def test_the_contact_sheet_shows_the_average_that_is_saved(config, tmp_path):
    config = dataclasses.replace(config, validation_steps=4, learning_rate=0.05)
    averaged = dataclasses.replace(config, use_ema=True, output_dir=str(tmp_path / "averaged"))
    for run in (config, averaged):
        train(run)
    plain, average = shown(config), shown(averaged)
    assert plain.keys() == average.keys()
    same = {name for name in plain if plain[name] == average[name]}
    assert same == {"step-000000-00.png"}


def test_validation_does_not_touch_the_training(config):
    plain = contents(train(config))
    assert contents(train(dataclasses.replace(config, validation_steps=1))) == plain


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
        ({"pretrained_model_name_or_path": "no/such/folder"}, "'no/such/folder' is no folder or file here"),
        ({"instance_prompt": "a photo of a teapot"}, "trigger_word='sks': no prompt names it"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "'checkpoint-9': no such checkpoint"),
        ({"report_to": "telegraph"}, "accelerate cannot start: .*telegraph"),
    ],
)
def test_mistakes_are_user_errors(config, fields, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, **fields))


def test_class_images_have_a_folder_for_every_class(config, tmp_path):
    config = dataclasses.replace(
        config,
        with_prior_preservation=True,
        num_class_images=1,
        class_data_dir=str(tmp_path / "class" / "{class_name}"),
        max_train_steps=1,
    )
    for name in ("mug", "cat"):
        train(dataclasses.replace(config, class_name=name))
    assert sorted(folder.name for folder in (tmp_path / "class").iterdir()) == ["cat", "mug"]


def test_every_batch_is_drawn_anew_and_every_photo_in_turn(config, teapot_images, monkeypatch):
    for number in range(3):
        (teapot_images / f"{number}.txt").write_text(f"sks {number}")
    drawn, noised = recorded(monkeypatch, DreamBoothDataset), recorded(monkeypatch, ForwardDiffusion)
    train(dataclasses.replace(config, max_train_steps=3, gradient_accumulation_steps=2))
    assert len(drawn) == len(noised) == 6
    targets = torch.cat([batch.target for _, batch in noised])
    assert len(targets.flatten(1).unique(dim=0)) == 12
    assert len(torch.cat([batch.timesteps for _, batch in noised]).unique()) > 6
    prompts = [number for _, batch in drawn for number in batch.prompts]
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


def test_a_checkpoint_beyond_the_last_step_is_refused(config):
    train(dataclasses.replace(config, checkpointing_steps=4))
    again = dataclasses.replace(config, resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(UserError, match="max_train_steps=2, but .*checkpoint-4 is at step 4"):
        train(again)


@pytest.fixture
def stopped(config, tmp_path):
    """A run that is to go on from its second step, with masks; and its photos, in a folder of their own."""
    folder = tmp_path / "mine" / "teapot"
    shutil.copytree(config.instance_data_dir, folder)
    (folder / "mask").mkdir()
    for file in folder.glob("*.png"):
        Image.new("L", Image.open(file).size, 255).save(folder / "mask" / file.name)
    config = dataclasses.replace(config, instance_data_dir=str(folder), masked_loss=True, max_train_steps=2)
    config = dataclasses.replace(config, checkpointing_steps=2)
    place = train(config)
    return dataclasses.replace(config, resume_from_checkpoint="latest"), folder, place


def another_photo(folder):
    Image.effect_noise(Image.open(folder / "1.png").size, 90).convert("RGB").save(folder / "1.png")


def a_new_photo(folder):
    shutil.copy(folder / "1.png", folder / "9.png")
    shutil.copy(folder / "mask" / "1.png", folder / "mask" / "9.png")
    Image.effect_noise(Image.open(folder / "9.png").size, 90).convert("RGB").save(folder / "9.png")


def another_caption(folder):
    (folder / "0.txt").write_text("a blue sks teapot")


def another_mask(folder):
    mask = Image.open(folder / "mask" / "2.png")
    mask.putpixel((3, 3), 0)
    mask.save(folder / "mask" / "2.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_photo, r"other instance images \(changed: 1.png\)"),
        (a_new_photo, r"other instance images \(new: 9.png\)"),
        (another_caption, r"other instance images \(caption changed: 0.png\)"),
        (another_mask, r"other instance images \(mask changed: 2.png\)"),
    ],
)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_goes_on_with_what_it_began_with_only(stopped, change, said, steps):
    config, folder, place = stopped
    change(folder)
    before = place.read_bytes()
    with pytest.raises(UserError, match=f"checkpoint-2: written with {said}. Put back .*another output_dir"):
        train(dataclasses.replace(config, max_train_steps=steps))
    assert place.read_bytes() == before


def test_another_base_of_the_same_shape_is_refused(stopped, tiny_pipe, tmp_path):
    config, _, place = stopped
    before = place.read_bytes()
    tiny_pipe.unet.conv_in.bias.data[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"checkpoint-2: written with another base \(unet\)"):
        train(dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "other")))
    assert place.read_bytes() == before


def test_the_same_photos_and_base_may_lie_elsewhere_and_the_run_go_on_for_longer(stopped, tiny_pipe_folder, tmp_path):
    config, folder, _ = stopped
    shutil.copytree(tiny_pipe_folder, tmp_path / "copied base")
    folder = folder.rename(tmp_path / "mine" / "moved")
    for name in ("0.png", "mask/0.png"):
        (folder / name).rename((folder / name).with_name("00.png"))
    moved = {"instance_data_dir": str(folder), "pretrained_model_name_or_path": str(tmp_path / "copied base")}
    place = train(dataclasses.replace(config, max_train_steps=3, **moved))
    assert read_delta_file(place).training["steps"] == 3


def test_a_file_that_no_step_was_done_for_says_how_it_was_trained(stopped):
    config, _, place = stopped
    before = read_delta_file(place).training
    train(dataclasses.replace(config, learning_rate=0.7, lr_scheduler="cosine"))
    assert read_delta_file(place).training == before


def test_a_checkpoint_with_other_parameters_is_refused(stopped):
    config, _, _ = stopped
    file = Path(config.output_dir) / "checkpoint-2" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["parameters"][next(iter(state["parameters"]))]
    torch.save(state, file)
    with pytest.raises(UserError, match="checkpoint-2: written by another version, with other parameters"):
        train(config)


def test_checkpoints_that_cannot_be_written_cost_only_themselves(config, small_files):
    config = dataclasses.replace(config, checkpointing_steps=2)
    expected = contents(train(config))
    size = (Path(config.output_dir) / "checkpoint-2" / "state.pt").stat().st_size
    before = {file: file.read_bytes() for file in Path(config.output_dir).glob("checkpoint-*/*")}
    told = r"step 2: .*checkpoint-2: cannot be written \(File too large\)"
    with small_files(size - 100), pytest.warns(UserWarning, match=told):
        assert contents(train(config)) == expected
    assert {file: file.read_bytes() for file in Path(config.output_dir).glob("checkpoint-*/*")} == before
    assert not [file for file in Path(config.output_dir).iterdir() if "unfinished" in file.name]


def test_a_result_that_cannot_be_written_is_kept_elsewhere(config, monkeypatch, tmp_path):
    usual, spare = saving.save_trained, tmp_path / "spare"

    def full(pipe, adapter, place, **facts):
        if place.is_relative_to(config.output_dir):
            raise WriteError(place, "No space left on device", "free some space")
        usual(pipe, adapter, place, **facts)

    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setattr(saving, "save_trained", full)
    with pytest.raises(
        WriteError, match=r"teapot.atoms.safetensors: cannot be written \(No space.* is in .*spare"
    ) as told:
        train(config)
    (kept,) = spare.rglob("teapot.atoms.safetensors")
    assert str(kept) in str(told.value) and read_delta_file(kept).training["steps"] == 4


def test_a_folder_in_which_another_run_writes_is_refused(config):
    with lock_folder(Path(config.output_dir)):
        with pytest.raises(UserError, match=rf"another run is writing there \(process {os.getpid()} on"):
            train(config)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_result_that_would_replace_its_own_base_is_refused(config, tiny_pipe_folder, adapter, tmp_path):
    base = tmp_path / "models" / "teapot"
    shutil.copytree(tiny_pipe_folder, base)
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    (tmp_path / "lora.json").write_text('{"peft_type": "LORA", "target_modules": ["to_q"]}')
    method = {"adapter": "full" if adapter == "full" else str(tmp_path / "lora.json")}
    fields = {"pretrained_model_name_or_path": str(base), "output_dir": str(base.parent), **method}
    with pytest.raises(UserError, match="teapot: the result would replace .* the run reads; name another output_dir"):
        train(dataclasses.replace(config, **fields))
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == before


def test_a_tuned_pipeline_that_cannot_be_written_leaves_the_earlier_one(config, monkeypatch, small_files, tmp_path):
    config = dataclasses.replace(config, adapter="full", train_token=False, max_train_steps=1, learning_rate=1e-3)
    folder = train(config)
    (folder / "README.md").write_text("mine")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    size = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    with small_files(size - 100), pytest.raises(WriteError, match="teapot: cannot be written"):
        train(dataclasses.replace(config, learning_rate=1e-2))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    train(dataclasses.replace(config, learning_rate=1e-2))
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert after.keys() == before.keys() and after[folder / "README.md"] == b"mine" and after != before


def blind_base(tiny_pipe, folder):
    """A base whose VAE gives numbers that are not finite when it decodes."""
    tiny_pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    tiny_pipe.save_pretrained(folder)
    return {"pretrained_model_name_or_path": str(folder)}


def test_class_images_that_are_not_finite_or_black_are_not_trained_on(config, tiny_pipe, tmp_path):
    config = dataclasses.replace(config, with_prior_preservation=True, num_class_images=2, max_train_steps=1)
    blind = dataclasses.replace(config, **blind_base(tiny_pipe, tmp_path / "blind"))
    with pytest.raises(UserError, match="not finite.*VAE"):
        train(blind)
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


def test_validation_images_that_are_not_finite_cost_only_their_row(config, tiny_pipe, tmp_path):
    train(dataclasses.replace(config, max_train_steps=2, validation_steps=2))
    blind = dataclasses.replace(config, validation_steps=2, **blind_base(tiny_pipe, tmp_path / "blind"))
    with pytest.warns(UserWarning, match="step 2: no row of the contact sheet: .*not finite"):
        place = train(blind)
    assert read_delta_file(place).training["steps"] == 4
    assert not list((Path(config.output_dir) / "validation").glob("*.png"))
