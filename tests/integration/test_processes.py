"""Training on two processes of torch's launcher: what they learn, what each of them writes, and how they end."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atomdiff.training.config import load_config
from atomdiff.training.dreambooth import train

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # processes that import torch
HOW = "resume with the same command and --resume_from_checkpoint latest"
EVERYTHING = {
    "train_text_encoder": True,
    "num_vectors": 2,
    "with_prior_preservation": True,
    "num_class_images": 3,
    "preservation": "class",
    "sample_batch_size": 1,
    "aspect_ratio_buckets": "auto",
    "random_flip": True,
    "shuffle_captions": True,
    "caption_dropout": 0.3,
    "masked_loss": True,
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
    "timestep_sampling": "logit_normal",
    "optimizer": "prodigy",
    "use_ema": True,
    "lr_warmup_steps": 1,
    "gradient_accumulation_steps": 2,
    "validation_steps": 2,
    "validation_split": 0.3,
    "validation_loss_steps": 1,
    "keep_best": True,
}
# One launch after the other, each with the options of `atomdiff train` and what goes wrong. Like other launchers, this
# ends all processes when one fails, but waits for all where they are asked to stop; they are forked, so that they need
# not import everything again.
LAUNCHES = """
import json, multiprocessing, os, shutil, signal, socket, sys, time
from pathlib import Path
import accelerate, diffusers, peft
from atomdiff.cli.main import main
from atomdiff.training import dreambooth, measurements, resume, validation

def work(rank, port, options, spoilt):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    if rank:
        resume.save_checkpoint = dreambooth.save_result = validation.extend_contact_sheet = None
        measurements.append_line = dreambooth.report = None
    elif spoilt in ("disk", "late"):
        def save_checkpoint(*_):
            raise OSError(28, "No space left on device")
        resume.save_checkpoint = save_checkpoint
    usual = dreambooth.batch_loss
    def spoilt_loss(run, number):
        if not number and (spoilt == "both" or (rank and spoilt == "one")):
            os.kill(os.getpid(), signal.SIGTERM if spoilt == "both" else signal.SIGINT)
        while rank and spoilt == "late" and number and not signal.getsignal(signal.SIGTERM).__self__.requested:
            time.sleep(0.01)
        return usual(run, number) * (float("nan") if rank and spoilt == "loss" else 1)
    dreambooth.batch_loss = spoilt_loss
    sys.exit(main(["train", *options]))

folder, launches = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, (options, spoilt) in launches.items():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=(rank, port, options, spoilt)) for rank in (0, 1)]
    for process in both:
        process.start()
    stops = spoilt in ("one", "both")
    while any(process.is_alive() for process in both) and (stops or not any(process.exitcode for process in both)):
        time.sleep(0.05)
    failed = next((process.exitcode for process in both if process.exitcode), 0)
    for process in both:
        process.terminate()
        process.join()
    print(name, "ends with", failed, flush=True)
    if not failed:
        shutil.copytree(folder / "two", folder / name)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_pipe_folder):
    """Holds run.yaml, with two subjects and nearly all that a run can do."""
    folder, random = tmp_path_factory.mktemp("processes"), np.random.default_rng(0)
    subjects = []
    for name, word in (("teapot", "sks"), ("robot", "zwx")):
        (folder / name / "mask").mkdir(parents=True)
        for number, side in enumerate((32, 40, 64)):
            image = Image.fromarray(random.integers(0, 255, (32, side, 3), dtype=np.uint8))
            image.save(folder / name / f"{number}.png")
            image.convert("L").save(folder / name / "mask" / f"{number}.png")
            (folder / name / f"{number}.txt").write_text("a photo of {trigger} {class_name}, red, blue")
        subjects.append({"instance_data_dir": str(folder / name), "class_name": name, "trigger_word": word})
    (folder / "subjects.yaml").write_text(json.dumps(subjects))
    adapter = {"peft_type": "ATOMS", "select": "adaptive", "select_budget": "30KB"}
    (folder / "adapter.json").write_text(json.dumps(adapter))
    run = {
        "adapter": str(folder / "adapter.json"),
        "pretrained_model_name_or_path": str(tiny_pipe_folder),
        "concepts_list": str(folder / "subjects.yaml"),
        "output_dir": str(folder / "two"),
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "train_batch_size": 1,
        "num_inference_steps": 2,
        "logging_steps": 1,
        "mixed_precision": "no",
        "report_to": None,
    }
    (folder / "run.yaml").write_text(json.dumps(run | EVERYTHING))
    cold = dataclasses.replace(load_config(["--config", str(folder / "run.yaml")]), max_train_steps=1)
    train(dataclasses.replace(cold, output_dir=str(folder / "library")).runs()[0])
    return folder


def warm(folder):
    """Fields of the runs that start from a library."""
    return {"init_from": str(folder / "library"), "init_probe_steps": 1}


@pytest.fixture(scope="module")
def launched(folder):
    """The launches, run: "trained", "resumed", four that fail and two that are stopped."""
    (folder / "bad").mkdir()
    for name in ("bad.png", "worse.png"):
        (folder / "bad" / name).write_text("no image")
    run = ["--config", str(folder / "run.yaml")]
    plain = f"--concepts_list null --class_name mug --masked_loss false --output_dir {folder / 'failed'}".split()
    teapot = ["--instance_data_dir", str(folder / "teapot")]
    start = [part for name, value in warm(folder).items() for part in (f"--{name}", str(value))]
    launches = {
        "trained": ([*run, *start], ""),
        "resumed": ([*run, *start, "--resume_from_checkpoint", "checkpoint-1"], ""),
        "images": ([*run, *plain, "--instance_data_dir", str(folder / "bad")], ""),
        "disk": ([*run, *plain, *teapot], "disk"),
        "late": ([*run, *plain, *teapot, "--gradient_accumulation_steps", "1"], "late"),
        "loss": ([*run, *plain, *teapot], "loss"),
        "one": ([*run, *plain, *teapot], "one"),
        "both": ([*run, *plain, *teapot], "both"),
    }
    (folder / "launches.py").write_text(LAUNCHES)
    command = [sys.executable, str(folder / "launches.py"), str(folder), json.dumps(launches)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


def tensors_in(state, path=""):
    """All tensors of a nested state, with where they are."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state if isinstance(state, list) else ())
    return {name: tensor for key, value in items for name, tensor in tensors_in(value, f"{path}/{key}").items()}


def state_of(run):
    return torch.load(run / "checkpoint-2" / "state.pt", weights_only=True)


def measured(run):
    """The losses and the base drift of each measurement of a run."""
    lines = map(json.loads, (run / "validation_log.jsonl").read_text().splitlines())
    return [
        {name: line[name] for name in ("step", "validation_loss", "training_images_loss", "base_drift")}
        for line in lines
    ]


def test_two_processes_learn_what_one_does_in_as_many_batches(launched, folder):
    config = load_config(["--config", str(folder / "run.yaml")])
    alone = dataclasses.replace(config, output_dir=str(folder / "one"), gradient_accumulation_steps=4, **warm(folder))
    for run in alone.runs():
        one, two = Path(train(run)).parent, folder / "trained" / Path(run.output_dir).name
        alone_state, state = state_of(one), state_of(two)
        assert state["average_loss"] == pytest.approx(alone_state["average_loss"], rel=1e-5)
        assert [each["name"] for each in alone_state["start"]] == [each["name"] for each in state["start"]]
        assert state["start"] or two.name != "teapot"  # of the same images
        expected, tensors = tensors_in(alone_state), tensors_in(state)
        assert expected.keys() == tensors.keys()
        for name, tensor in expected.items():
            error = (tensors[name] - tensor).abs().max()
            assert error <= 1e-4 * tensor.abs().max(), name
        assert "/best/parameters/denoiser" in " ".join(tensors)
        for one_line, two_line in zip(*map(measured, (one, two)), strict=True):
            assert one_line == pytest.approx(two_line, rel=1e-4, abs=1e-6)
        class_images = sorted((one / "class_images").glob("*.png"))
        assert len(class_images) == 3
        for file in class_images:
            assert (two / "class_images" / file.name).read_bytes() == file.read_bytes()


def test_a_resumed_run_ends_as_one_that_was_never_stopped(launched, folder):
    for name in ("teapot", "robot"):
        expected, resumed = (tensors_in(state_of(folder / run / name)) for run in ("trained", "resumed"))
        assert expected and all(torch.equal(resumed[each], tensor) for each, tensor in expected.items())


def test_only_the_main_process_writes_and_prints(launched, folder):
    saved = [line for line in launched.stdout.splitlines() if line.startswith("saved")]
    files = [folder / "two" / name / f"{name}.atoms.safetensors" for name in ("teapot", "robot")]
    assert saved == [f"saved {file}" for file in files * 2]
    for name in ("teapot", "robot"):
        log = folder / "trained" / name / "training_log.jsonl"
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
        assert [line["step"] for line in measured(folder / "trained" / name)] == [0, 1, 2]
        for file in ("contact_sheet.png", "report.html"):
            assert (folder / "trained" / name / file).is_file()


def test_what_goes_wrong_in_one_process_ends_both_with_one_message(launched, folder):
    ends = [line.rpartition(" ")[2] for line in launched.stdout.splitlines() if "ends with" in line]
    assert ends == ["0", "0", "2", "2", "2", "2", "130", "130"]
    images, disk, late, loss = [
        line for line in launched.stderr.splitlines() if line.startswith("atomdiff train: error:")
    ]
    assert re.search(r"bad: cannot be read: bad.png \(.*\), worse.png \(.*\). Replace or remove them$", images)
    assert disk.endswith("No space left on device") and late == disk
    assert "step 1: the loss is nan" in loss
    assert "Traceback" not in launched.stderr


def test_asked_to_stop_both_processes_end_at_once_with_one_message(launched, folder):
    stopped = [line for line in launched.stderr.splitlines() if "stopped" in line]
    assert stopped == [f"stopped; {folder / 'failed' / 'checkpoint-1'} is saved: {HOW}"] * 2
