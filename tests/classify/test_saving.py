"""Saved classifiers: loaded bit for bit, replaced whole or not at all, and checked."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ResNetForImageClassification

from atomdiff.classify import train as training
from atomdiff.classify.model import open_base
from atomdiff.classify.saving import load_classifier
from atomdiff.classify.train import train_classifier
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from tests.helpers import assert_same_tensors, change_tensors

ACTIVATION_ADAPTERS = [f"configs/experiments/classify/{name}/adapter.json" for name in ("mona", "conv_adapter")]


def first_weight(model):
    return model.resnet.embedder.embedder.convolution.weight


def classifier(config):
    return Path(config.output_dir) / "classifier"


@pytest.mark.parametrize("method", ["linear", "full", "atoms", "lora", *ACTIVATION_ADAPTERS])
def test_what_was_saved_gives_the_logits_that_were_trained(config, method, with_method, trained, untrained, logits):
    config = with_method(config, method)
    train_classifier(config)
    loaded = load_classifier(classifier(config))
    assert not loaded.training and loaded.config.id2label == {0: "across", 1: "down", 2: "tilted"}
    assert_same_tensors(loaded.state_dict(), trained[0].state_dict())
    torch.testing.assert_close(logits(loaded), logits(trained[0]), atol=1e-6, rtol=0)
    assert (logits(loaded) - logits(untrained(config))).abs().max() > 1e-3
    assert AutoImageProcessor.from_pretrained(classifier(config)).size["shortest_edge"] == 16


def test_directions_that_layers_share_are_stored_once(config, tmp_path, trained, logits):
    adapter = {"peft_type": "ATOMS", "basis": "dct", "share": "kind", "share_count": 2, "channel_block": 1}
    (tmp_path / "adapter.json").write_text(json.dumps(adapter))
    report = train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json"), learning_rate=0.03))
    stored = load_file(classifier(config) / "adapter_model.safetensors")
    assert sum(key.endswith("atom_shared") for key in stored) > 2
    assert sum(tensor.numel() for tensor in stored.values()) == report["num_trainable_parameters"]["adapter"]
    loaded = load_classifier(classifier(config))
    assert torch.equal(logits(loaded), logits(trained[0]))
    found = PeftModel.from_pretrained(open_base(config.pretrained_model_name_or_path), str(classifier(config)))
    assert_same_tensors(peft_tensors(found.base_model.model, "default"), peft_tensors(loaded, "default"))


def test_statistics_of_batch_norms_are_saved(config, untrained):
    train_classifier(config)
    loaded, base = load_classifier(classifier(config)).resnet, untrained(config).resnet
    mean = loaded.embedder.embedder.normalization.running_mean
    assert not torch.equal(mean, base.embedder.embedder.normalization.running_mean)


def test_another_base_is_refused(config, tmp_path):
    train_classifier(config)
    other = ResNetForImageClassification.from_pretrained(config.pretrained_model_name_or_path)
    with torch.no_grad():
        first_weight(other)[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    load_classifier(classifier(config), config.pretrained_model_name_or_path)
    with pytest.raises(UserError, match="not those that it was trained on"):
        load_classifier(classifier(config), str(tmp_path / "other"))


def test_the_base_is_not_replaced_by_what_is_trained_on_it(config):
    train_classifier(dataclasses.replace(config, adapter="full"))
    before = (classifier(config) / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="would be replaced, but holds .*; name another output_dir"):
        train_classifier(dataclasses.replace(config, pretrained_model_name_or_path=str(classifier(config))))
    assert (classifier(config) / "model.safetensors").read_bytes() == before


def test_a_classifier_is_replaced_but_nothing_else(config):
    for method in ("full", "linear"):
        train_classifier(dataclasses.replace(config, adapter=method))
    assert not (classifier(config) / "model.safetensors").exists()
    (classifier(config) / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="is not a classifier; move it away"):
        train_classifier(config)
    assert (classifier(config) / "head.safetensors").is_file()
    shutil.rmtree(classifier(config))
    classifier(config).write_text("a file of somebody")
    with pytest.raises(UserError, match="is not a classifier; move it away"):
        train_classifier(config)


@pytest.mark.slow
def test_a_save_that_fails_leaves_the_earlier_classifier(config, monkeypatch, logits):
    train_classifier(config)
    before = logits(load_classifier(classifier(config)))

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("atomdiff.classify.saving.save_file", fail)
    with pytest.raises(WriteError, match="classifier: cannot be written .No space"):
        train_classifier(dataclasses.replace(config, seed=1))
    assert torch.equal(logits(load_classifier(classifier(config))), before)


def test_a_classifier_that_cannot_be_written_is_kept_elsewhere(config, monkeypatch, tmp_path):
    usual, temporary = training.save_classifier, tmp_path / "temporary"

    def full(folder, *rest):
        if folder.is_relative_to(config.output_dir):
            raise WriteError(folder, "No space left on device", "free some space")
        usual(folder, *rest)

    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(training, "save_classifier", full)
    with pytest.raises(WriteError, match="classifier: cannot be written .No space.*temporary"):
        train_classifier(config)
    load_classifier(next(temporary.rglob("classifier")))
    assert not (Path(config.output_dir) / "report.json").exists()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("classifier.json", lambda file: file.write_text("{"), "classifier.json: not JSON .*; copy the folder again"),
        ("classifier.json", lambda file: file.write_text("{}"), "classifier.json: expected base_model, base_sha256"),
        (
            "head.safetensors",
            lambda file: change_tensors(
                file, lambda tensors: {name: tensor[:2] for name, tensor in tensors.items() if tensor.ndim}
            ),
            "head.safetensors: classifier.1.bias, classifier.1.weight.* missing, unknown or of another shape",
        ),
        (
            "head.safetensors",
            lambda file: change_tensors(file, lambda tensors: dict(list(tensors.items())[:-1])),
            "head.safetensors: .* missing, unknown",
        ),
        (
            "adapter_model.safetensors",
            lambda file: change_tensors(file, lambda tensors: dict(list(tensors.items())[:-1])),
            "the adapter does not fit the base: its tensors do not fit",
        ),
    ],
)
def test_damaged_classifiers_are_user_errors(config, file, damage, message):
    train_classifier(config)
    damage(classifier(config) / file)
    with pytest.raises(UserError, match=message):
        load_classifier(classifier(config))
