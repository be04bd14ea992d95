"""Several subjects in one batch: each gives the concept that it gives alone, and fails alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atomdiff.cli.main import main
from atomdiff.training import dreambooth, joint_step, together
from atomdiff.training.anomalies import DivergedError
from atomdiff.training.checkpoint import find_checkpoints
from atomdiff.training.dreambooth import train
from atomdiff.training.intermediate import GENERATE_FILE, SAVE_FILE, list_saved_steps
from atomdiff.training.run_record import RECORD_FILE
from atomdiff.training.signals import StopSignals
from atomdiff.training.together import train_subjects
from atomdiff.training.together_checks import check_together
from atomdiff.utils.errors import UserError
from tests.helpers import concept_bytes, write_images

WIDTHS = {"teapot": (32, 32), "mug": (32, 64, 64), "cat": (32,)}


@pytest.fixture
def config(train_config, tmp_path):
    """Makes the config of a run of subjects with different numbers of images, three at a time."""

    def make(names=("teapot", "mug", "cat"), **fields):
        subjects = []
        for seed, name in enumerate(WIDTHS):
            folder = tmp_path / name
            if not folder.is_dir():
                write_images(folder, widths=WIDTHS[name], seed=seed)
            if name in names:
                subjects.append({"instance_data_dir": str(folder), "class_name": name})
        file = tmp_path / f"{'-'.join(names)}.json"
        file.write_text(json.dumps(subjects))
        (tmp_path / "adapter.json").write_text('{"peft_type": "ATOMS", "target_modules": ["conv1", "to_k"]}')
        usual = {"adapter": str(tmp_path / "adapter.json"), "learning_rate": 0.02, "subjects_per_batch": 3}
        return train_config(**{"concepts_list": str(file), **usual} | fields)

    return make


@pytest.fixture
def trained(monkeypatch):
    """The trained parameters of each run at its end, in float32, by the run's output folder."""
    found, usual = {}, dreambooth.save_result

    def save(run, *rest):
        found[run.config.output_dir] = {name: p.detach().clone() for name, p in run.trainable.items()}
        return usual(run, *rest)

    monkeypatch.setattr(dreambooth, "save_result", save)
    return found


def train_alone(run, folder):
    """Train one of a config's runs by itself; return its output folder and its file."""
    alone = dataclasses.replace(run, output_dir=str(folder / run.name))
    return alone.output_dir, train(alone)


def check_same(found, expected):
    """Check the tolerance that is promised: 0.1 % of the largest number of a tensor, in the mean 0.001 %.

    AdamW makes as much of a gradient of rounding errors alone as of any other.
    """
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        errors = (found[name] - tensor).abs() / tensor.abs().max()
        assert errors.max() <= 1e-3 and errors.mean() <= 1e-5, (name, errors.max(), errors.mean())


def check_same_file(found, expected):
    """Check that concept files are equal but for the rounding of numbers in half precision."""
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = 1e-3 * float(tensor.abs().max())
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0, atol=atol)


@pytest.mark.slow
def test_each_gives_what_it_gives_alone_with_all_that_a_step_may_do(config, trained, tmp_path):
    everything = config(
        names=("teapot", "mug"),
        with_prior_preservation=True,
        num_class_images=2,
        preservation="class",
        aspect_ratio_buckets="32,32;32,64",
        gradient_accumulation_steps=2,
        train_text_encoder_ti_frac=0.5,
        lr_scheduler="cosine",
        max_grad_norm=0.01,
        use_ema=True,
        caption_dropout=0.3,
        max_train_steps=4,
        validation_loss_steps=4,
        validation_steps=4,
    )
    results = train_subjects(everything)
    assert list(results) == ["teapot", "mug"]
    run = everything.runs()[1]
    folder = Path(run.output_dir)
    alone, file = train_alone(dataclasses.replace(run, class_data_dir=str(folder / "class_images")), tmp_path / "alone")
    check_same(trained[run.output_dir], trained[alone])
    check_same_file(results[run.name], file)
    for name, loss in {"training_log.jsonl": "loss", "validation_log.jsonl": "training_images_loss"}.items():
        found, expected = ((Path(each) / name).read_text().splitlines() for each in (folder, alone))
        for line, other in zip(map(json.loads, found), map(json.loads, expected), strict=True):
            assert line[loss] == pytest.approx(other[loss], rel=1e-3) and line["step"] == other["step"]
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["result"]["name"] == results["mug"].name and record["config"]["concepts_list"] is None
    assert "subjects_per_batch" not in record["settings"]
    assert (folder / "report.html").is_file() and (folder / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_a_subject_that_goes_wrong_harms_no_other(config, trained, tmp_path, monkeypatch, capsys):
    usual, folder = joint_step.loss_of, tmp_path / "out"

    def loss_of(run, number, *rest):
        factor = {"teapot": 1.0, "mug": 1e4, "cat": float("nan") if number == 1 else 1.0}[run.config.name]
        return usual(run, number, *rest) * factor

    monkeypatch.setattr(joint_step, "loss_of", loss_of)
    run = config(max_train_steps=4)
    results = train_subjects(run)
    error = results["cat"]
    assert isinstance(error, DivergedError) and "step 2: the loss is nan" in str(error) and "cat/0.png" in str(error)
    assert not (folder / "cat" / "cat.atoms.safetensors").exists()
    assert "diverged" in (folder / "cat" / "report.md").read_text()
    for name in ("teapot", "mug"):
        assert results[name] == folder / name / f"{name}.atoms.safetensors" and results[name].is_file()
    teapot = run.runs()[0]
    alone, _ = train_alone(teapot, tmp_path / "alone")
    check_same(trained[teapot.output_dir], trained[alone])
    with pytest.raises(UserError, match=r"(?s)1 of 3 subjects failed\ncat is not saved: step 2.*saved .*teapot"):
        together.describe_results(results)


@pytest.mark.slow
def test_gradients_that_are_not_finite_stop_their_own_run(config, monkeypatch):
    usual = joint_step.clip_gradients

    def clip(accelerator, parameters, norm):
        parameters = list(parameters)
        found = usual(accelerator, parameters, norm)
        return float("inf") if "mug" in str(accelerator.project_dir) else found

    monkeypatch.setattr(joint_step, "clip_gradients", clip)
    results = train_subjects(config(names=("teapot", "mug"), max_train_steps=2))
    assert "step 1: the gradient's norm is inf" in str(results["mug"]) and results["teapot"].is_file()


@pytest.mark.slow
def test_stopped_and_resumed_it_gives_the_same_bytes_and_leaves_finished_subjects_alone(
    config, tmp_path, monkeypatch, capsys
):
    run = config(names=("teapot", "mug"), max_train_steps=4, subjects_per_batch=2)
    whole = train_subjects(dataclasses.replace(run, output_dir=str(tmp_path / "whole")))
    usual = together.train_step

    def stop(members, denoiser, step):
        if step == 2:
            signals[-1].requested = True
        return usual(members, denoiser, step)

    signals, enter = [], StopSignals.__enter__
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: signals.append(self) or enter(self))
    monkeypatch.setattr(together, "train_step", stop)
    with pytest.raises(KeyboardInterrupt, match="checkpoints of step 2 are saved"):
        train_subjects(run)
    monkeypatch.setattr(together, "train_step", usual)
    for name in whole:
        assert [each.folder.name for each in find_checkpoints(tmp_path / "out" / name)] == ["checkpoint-2"]

    resumed = dataclasses.replace(run, resume_from_checkpoint="latest")
    results = train_subjects(resumed)
    assert {name: concept_bytes(file) for name, file in results.items()} == {
        name: concept_bytes(file) for name, file in whole.items()
    }
    results["mug"].unlink()
    trained = []
    monkeypatch.setattr(together, "train_together", lambda runs, base: trained.extend(runs) or {"mug": Path("new")})
    again = train_subjects(resumed)
    assert [run.name for run in trained] == ["mug"] and again == {"teapot": results["teapot"], "mug": Path("new")}
    assert "teapot: finished already" in capsys.readouterr().err
    changed = dataclasses.replace(resumed, learning_rate=0.03)
    monkeypatch.setattr(together, "train_together", lambda runs, base: {run.name: Path("new") for run in runs})
    assert set(train_subjects(changed).values()) == {Path("new")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "full"}, r"adapter='full' \(full\): each subject would need a base of its own"),
        ({"adapter": "configs/experiments/mona/default/adapter.json"}, r"\(MONA\): it was not tried .* ATOMS, LORA"),
        ({"train_text_encoder": True}, "train_text_encoder=True: each subject would need text encoders of its own"),
        ({"load_in_4bit": True}, "load_in_4bit=True: quantized weights cannot be shared"),
        ({"detect_anomaly": True}, "detect_anomaly=True"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(config, fields, message):
    with pytest.raises(UserError, match=message) as found:
        check_together(config(**fields).runs())
    assert "subjects_per_batch 1" in str(found.value)


def test_dropout_and_other_numbers_of_steps_are_refused(config, adapter_file):
    with pytest.raises(UserError, match=r"lora_dropout=0.2: the random numbers of dropout"):
        check_together(config(adapter=adapter_file("lora")).runs())
    runs = config().runs()
    with pytest.raises(UserError, match="max_train_steps=3, 7: expected the same for all subjects"):
        check_together([runs[0], dataclasses.replace(runs[1], max_train_steps=7)])


@pytest.mark.slow
def test_what_only_a_run_shows_is_refused(config, monkeypatch, tiny_pipe, tmp_path):
    tiny_pipe.unet.mid_block.resnets[0].dropout.p = 0.1
    monkeypatch.setattr(together, "load_base", lambda run: tiny_pipe)
    with pytest.raises(UserError, match="the base has dropout"):
        train_subjects(config(names=("teapot", "mug")))


def test_it_needs_a_list_of_subjects(train_config, config, tmp_path):
    listed = {"concepts_list": config(names=("mug",)).concepts_list, "one_file": True}
    for fields in ({"instance_data_dir": str(tmp_path / "mug")}, listed):
        with pytest.raises(UserError, match=r"subjects_per_batch=2: expected several subjects in a concepts_list"):
            train_config(subjects_per_batch=2, **fields)


@pytest.mark.slow
def test_a_folder_in_use_stops_its_own_subject_alone(config, tmp_path, capsys):
    from atomdiff.utils.folder_lock import lock_folder

    run = config(names=("teapot", "mug"), max_train_steps=1)
    options = [f"--{name}={getattr(run, name)}" for name in ("concepts_list", "adapter", "output_dir")]
    options += [f"--pretrained_model_name_or_path={run.pretrained_model_name_or_path}", "--validation_loss_steps=0"]
    options += ["--max_train_steps=1", "--subjects_per_batch=2", "--train_batch_size=1", "--report_to=none"]
    with lock_folder(tmp_path / "out" / "mug"):
        assert main(["train", *options]) == 2
    assert "mug is not saved" in (shown := capsys.readouterr().err) and f"saved {tmp_path}/out/teapot/teapot" in shown
    assert main(["train", *options]) == 0
    saved = capsys.readouterr().out.splitlines()
    assert saved == [f"saved {tmp_path}/out/{name}/{name}.atoms.safetensors" for name in ("teapot", "mug")]


@pytest.mark.slow
def test_each_subject_saves_its_steps_and_what_it_is_asked_for(config):
    everything = config(names=("teapot", "mug"), save_steps=2)
    teapot, mug = (Path(run.output_dir) for run in everything.runs())
    mug.mkdir(parents=True)
    for name in (GENERATE_FILE, SAVE_FILE):
        (mug / name).touch()
    train_subjects(everything)
    assert [step for step, _ in list_saved_steps(teapot)] == [2]
    assert [step for step, _ in list_saved_steps(mug)] == [1, 2]
    assert [file.name for file in (mug / "validation").iterdir()] == ["step-000001-00.png"]
    assert (mug / "checkpoint-1").is_dir() and not (teapot / "validation").exists()


@pytest.mark.slow
def test_bases_are_shared_before_the_next_subject_starts(config, monkeypatch):
    start, models, shared = together.start_run, [], []

    def start_run(*args, **options):
        shared.append(len({model.denoiser.conv_in.weight.data_ptr() for model in models}))
        started = start(*args, **options)
        models.append(started.run.model)
        return started

    monkeypatch.setattr(together, "start_run", start_run)
    train_subjects(config(names=("teapot", "mug", "cat"), subjects_per_batch=3, max_train_steps=1))
    assert shared == [0, 1, 1]
