"""Training runs of classifiers."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import ResNetForImageClassification, ViTConfig, ViTForImageClassification

from atomdiff.classify import train as training
from atomdiff.classify.model import open_base
from atomdiff.classify.saving import load_classifier
from atomdiff.classify.train import train_classifier
from atomdiff.tuner.adapter_state import atom_layers, peft_tensors
from atomdiff.tuner.selection import layer_scores
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from tests.helpers import assert_same_tensors

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["convolution"]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def first_weight(model):
    return model.resnet.embedder.embedder.convolution.weight


def classifier(config):
    return Path(config.output_dir) / "classifier"


@pytest.mark.parametrize("batch_norm", [None, "frozen"])
@pytest.mark.parametrize("method", ["linear", "full", "atoms", "lora"])
def test_only_what_the_method_names_moves_and_it_is_counted(
    config, method, batch_norm, with_method, trained, untrained
):
    config = with_method(config, method, batch_norm=batch_norm)
    report = train_classifier(config)
    before = untrained(config).state_dict()
    after = {name.replace("base_layer.", ""): tensor for name, tensor in trained[0].state_dict().items()}
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    heads, statistics = (names(before, what) for what in ("classifier", "running|num_batches"))
    updated = statistics if method != "linear" and batch_norm is None else set()
    assert moved == heads | updated | (before.keys() - statistics if method == "full" else set())
    sizes = {name.replace("base_layer.", ""): tensor.numel() for name, tensor in trained[0].named_parameters()}
    base = sum(before[name].numel() for name in before.keys() - heads - names(before, "num_batches"))
    added = sum(size for name, size in sizes.items() if name not in before)
    assert (added > 0) == (method in ("atoms", "lora"))
    counted = sum(before[name].numel() for name in names(before, "running")) if updated else 0
    adapter = sum(before[name].numel() for name in before.keys() - heads - statistics) if method == "full" else added
    assert report["num_trainable_parameters"] == {"adapter": adapter, "statistics": counted, "head": 16 * 3 + 3}
    assert report["num_base_parameters"] == base and report["trainable_share"] == (adapter + counted) / base


def names(tensors, pattern):
    return {name for name in tensors if re.search(pattern, name)}


@pytest.mark.parametrize("penalty", [0.0, 1e4])
def test_layers_are_chosen_by_their_scores(config, penalty, tmp_path, trained, logits):
    adapter = {"peft_type": "ATOMS", "select": "adaptive", "select_penalty": penalty}
    (tmp_path / "adapter.json").write_text(json.dumps(adapter))
    config = dataclasses.replace(config, adapter=str(tmp_path / "adapter.json"), max_train_steps=40, learning_rate=0.02)
    report = train_classifier(dataclasses.replace(config, validation_steps=40))
    scores = [float(score.parameter.detach()) for score in layer_scores(trained[0], "default")]
    assert max(scores) < 0.1 if penalty else max(scores) > 0.15
    acting = sum(score >= 0.1 for score in scores)
    assert report["selected_layers"].startswith(f"{acting} of {len(scores)}")
    loaded = load_classifier(classifier(config))
    assert len(atom_layers(loaded)) == acting and torch.equal(logits(loaded), logits(trained[0]))
    assert (classifier(config) / "adapter_config.json").exists() == (acting > 0)


def test_some_layers_of_a_classifier_leave(config, tmp_path, monkeypatch, trained, logits):
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS", "select": "adaptive"}))
    config = dataclasses.replace(config, adapter=str(tmp_path / "adapter.json"), max_train_steps=2, learning_rate=0.02)
    usual, left = training.training_loop, []

    def loop(run):
        validations = usual(run)
        for score in layer_scores(run.model, "default")[::2]:
            score.parameter.data.fill_(0.09)
            left.append(score.path)
        return validations

    monkeypatch.setattr(training, "training_loop", loop)
    report = train_classifier(config)
    loaded, total = load_classifier(classifier(config)), len(atom_layers(trained[0]))
    assert atom_layers(loaded).keys() == atom_layers(trained[0]).keys() - set(left)
    blocks = report["selected_layers"].removeprefix(f"{total - len(left)} of {total}: ")
    assert sum(int(block.split()[1]) for block in blocks.split(", ")) == total - len(left) > 0
    assert torch.equal(logits(loaded), logits(trained[0]))
    base = open_base(config.pretrained_model_name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        found = PeftModel.from_pretrained(base, str(classifier(config)))
    expected = peft_tensors(loaded, "default")
    assert_same_tensors(peft_tensors(found.base_model.model, "default"), expected)
    assert not any("select_score" in key for key in expected)


ALL = {"peft_type": "ATOMS", "target_modules": "all"}


@pytest.mark.parametrize(
    "adapter",
    [
        ALL,
        ALL | {"target_modules": "conv+proj"},
        {"peft_type": "COMBINED", "methods": [ALL, {"peft_type": "MONA", "hidden_size": 4}]},
    ],
    ids=["all", "conv+proj", "combined"],
)
def test_an_adapter_for_all_layers_excludes_the_head(config, adapter, tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(adapter))
    report = train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))
    assert report["num_trainable_parameters"]["head"] == 16 * 3 + 3
    assert not hasattr(load_classifier(classifier(config)).classifier[1], "base_layer")


@pytest.mark.slow
def test_atoms_alone_learn(config):
    config = dataclasses.replace(config, head_learning_rate=0.0, batch_norm="frozen", max_train_steps=60)
    report = train_classifier(dataclasses.replace(config, learning_rate=0.05, validation_steps=20))
    start = train_classifier(dataclasses.replace(config, learning_rate=0.0, max_train_steps=1))
    assert start["accuracy"]["train"] < 0.7
    assert report["accuracy"]["train"] > 0.9 and report["accuracy"]["test"] > 0.8
    assert report["images"] == {"train": 18, "validation": 9, "test": 9}


def test_the_weights_of_the_best_validation_are_kept(config, monkeypatch):
    usual, scores, weights = training.evaluate, iter((0.2, 0.7, 0.7, 0.7, 0.5)), []
    losses = iter((1.0, 1.0, 0.8, 0.9, 0.1))

    def judge(run, images):
        if images is not run.splits.validation or len(weights) == 5:
            return usual(run, images)
        weights.append(run.model.classifier[1].weight.detach().clone())
        return {"accuracy": next(scores), "loss": next(losses)}

    monkeypatch.setattr(training, "evaluate", judge)
    report = train_classifier(dataclasses.replace(config, validation_steps=2, max_train_steps=10))
    assert [validation["step"] for validation in report["validations"]] == [2, 4, 6, 8, 10]
    assert report["best_step"] == 6
    kept = load_classifier(classifier(config)).classifier[1].weight
    assert [torch.equal(kept, weight) for weight in weights] == [False, False, True, False, False]


def test_a_run_without_progress_stops_early(config, monkeypatch):
    scores = iter((0.5, 0.6, 0.4, 0.6, 0.9))
    monkeypatch.setattr(training, "evaluate", lambda run, images: {"accuracy": next(scores, 0.0), "loss": 1.0})
    report = train_classifier(dataclasses.replace(config, max_train_steps=10, early_stopping_patience=2))
    assert [validation["step"] for validation in report["validations"]] == [2, 4, 6, 8] and report["best_step"] == 4


@pytest.mark.slow
def test_same_config_same_numbers_and_the_seed_changes_all_choices(
    config, half_precision, with_method, trained, logits
):
    config = dataclasses.replace(config, random_flip=True, random_resized_crop=0.5, max_train_steps=2)
    config = with_method(config, "lora", mixed_precision=half_precision)
    reports = [train_classifier(run) for run in (config, config, dataclasses.replace(config, seed=1))]
    for report in reports:
        report.pop("train_seconds")
    assert reports[0] == reports[1]
    assert torch.equal(logits(trained[0]), logits(trained[1]))
    assert (logits(trained[0]) - logits(trained[2])).abs().max() > 1e-2


@pytest.mark.slow
def test_workers_change_nothing(config, trained, logits):
    config = dataclasses.replace(config, random_flip=True, random_resized_crop=0.5, max_train_steps=2)
    for workers in (0, 1):
        train_classifier(dataclasses.replace(config, dataloader_num_workers=workers))
    assert torch.equal(logits(trained[0]), logits(trained[1]))


def test_learning_rates_follow_the_schedule(config):
    config = dataclasses.replace(config, lr_scheduler="linear", lr_warmup_steps=2, learning_rate=0.01, logging_steps=1)
    train_classifier(config)
    lines = (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["lr"] for line in lines], [0, 0.005, 0.01, 0.005])


def test_a_base_from_scratch_is_trained_whole_from_its_config_alone(config, base, tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.json").write_text((base / "config.json").read_text())
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "plan"), from_scratch=True)
    report = train_classifier(dataclasses.replace(config, adapter="full", learning_rate=1e-2))
    assert report["trainable_share"] == 1.0
    assert not torch.allclose(
        first_weight(load_classifier(classifier(config))),
        first_weight(ResNetForImageClassification.from_pretrained(base)),
        atol=0.05,
    )
    with pytest.raises(UserError, match="adapter='atoms': from_scratch .* adapter \"full\""):
        train_classifier(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "none"}, "adapter='none': expected adapter \"linear\", which trains the head alone"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "'no/such/folder': neither a folder"),
        ({"train_data_dir": "nowhere"}, "train_data_dir='nowhere': no such folder"),
        ({"adapter": "nowhere.json"}, "adapter='nowhere.json': no such file"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"train_batch_size": 1, "resolution": 8}, "train_batch_size=1: .*at least 2, or batch_norm frozen"),
        ({"output_dir": "{images}/out"}, "output_dir=.*is inside train_data_dir"),
        ({"learning_rate": 1e30}, "step [23]: the (loss|gradient's norm) is (nan|inf); lower learning_rate"),
    ],
)
def test_mistakes_are_user_errors(config, fields, message):
    if "output_dir" in fields:
        fields = {"output_dir": fields["output_dir"].format(images=config.train_data_dir)}
    with pytest.raises(UserError, match=message):
        train_classifier(dataclasses.replace(config, **fields))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {**LORA, "target_modules": ["convolution", "classifier.1"], "exclude_modules": ["embedder.convolution"]},
            r"targets the head \(classifier.1\)",
        ),
        ({**LORA, "modules_to_save": ["classifier"]}, "modules_to_save=.*: leave it out"),
        ({**LORA, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({**LORA, "target_modules": ["nothing"]}, "the adapter does not fit the base"),
        ({"peft_type": "ATOMS", "target_modules": ["normalization"]}, "atoms adapt"),
    ],
)
def test_adapters_that_do_not_fit_are_user_errors(config, adapter, message, tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=message):
        train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))


def test_an_optimizer_that_is_not_installed_is_a_user_error(config, monkeypatch):
    monkeypatch.setattr("atomdiff.training.launch.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"optimizer='prodigy': prodigyopt is missing; pip install"):
        train_classifier(dataclasses.replace(config, optimizer="prodigy"))


@pytest.mark.parametrize("fields", [{"image_size": 32}, {"num_channels": 1}])
def test_images_that_a_base_does_not_take_are_refused_before_training(config, tmp_path, fields):
    ViTConfig(**{**SMALL, "image_size": 16, "patch_size": 4, **fields}).save_pretrained(tmp_path / "vit")
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "vit"), from_scratch=True)
    with pytest.raises(UserError, match=r"the model cannot process the images \(.*\); use another resolution"):
        train_classifier(dataclasses.replace(config, adapter="full"))


def test_a_method_that_needs_more_than_images_is_refused_before_training(config, tmp_path):
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4))
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "POLY", "target_modules": ["q_proj", "query"]}))
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "vit"))
    with pytest.raises(UserError, match="cannot process the images .*task_ids.*or adapter"):
        train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))


def test_a_folder_in_which_another_run_writes_is_refused(config):
    with lock_folder(Path(config.output_dir)), pytest.raises(UserError, match="another run is writing there .process"):
        train_classifier(config)


def test_a_transformer_goes_through_as_well(config, tmp_path):
    ViTConfig(**SMALL, image_size=16, patch_size=4).save_pretrained(tmp_path / "base")
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "base"), resolution=None)
    report = train_classifier(dataclasses.replace(config, from_scratch=True, adapter="full"))
    tuned = dataclasses.replace(
        config, pretrained_model_name_or_path=str(classifier(config)), output_dir=f"{tmp_path}/t"
    )
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS", "target_modules": "attention"}))
    report = train_classifier(dataclasses.replace(tuned, adapter=str(tmp_path / "adapter.json")))
    assert (
        report["num_trainable_parameters"]["adapter"] > 0 and report["num_trainable_parameters"]["head"] == 16 * 3 + 3
    )
    assert load_classifier(classifier(tuned)).config.image_size == 16


def test_averages_of_schedule_free_steps_are_validated_and_saved(config, monkeypatch, trained, logits):
    usual, modes, weights = training.evaluate, [], []

    def evaluate(run, images):
        if images is run.splits.validation and len(weights) < 2:
            modes.append(run.optimizer.optimizer.param_groups[0]["train_mode"])
            weights.append(run.model.classifier[1].weight.detach().clone())
        return usual(run, images)

    monkeypatch.setattr(training, "evaluate", evaluate)
    fields = {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "batch_norm": "frozen"}
    report = train_classifier(dataclasses.replace(config, **fields))
    best = [validation["step"] for validation in report["validations"]].index(report["best_step"])
    loaded = load_classifier(classifier(config))
    assert modes == [False, False] and torch.equal(loaded.classifier[1].weight, weights[best])
    assert torch.equal(logits(loaded), logits(trained[0]))


@pytest.mark.parametrize("adapter", ["atoms", "full"])
def test_prodigy_has_one_learning_rate_and_its_step_size_is_logged(config, adapter):
    config = dataclasses.replace(config, adapter=adapter, optimizer="prodigy", lr_scheduler="constant", logging_steps=1)
    assert config.learning_rates == {"adapter": 1.0, "head": 1.0}
    train_classifier(config)
    lines = (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["lr"] < 0.1 for line in lines)
