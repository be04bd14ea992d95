"""Fixtures of the tests of classifiers: a tiny base, images of three classes, and a short run."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from atomdiff.classify import train as training
from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.model import open_model
from atomdiff.classify.train import train_classifier

LORA = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.2, "target_modules": ["convolution"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random ResNet with batch statistics unlike those it was born with."""
    folder = tmp_path_factory.mktemp("base")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).train()
        model(torch.randn(16, 3, 16, 16))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, told apart by the direction of their stripes, 12 images each."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for name, wave in {"across": y, "down": x, "tilted": x + y}.items():
        (folder / name).mkdir()
        for number in range(12):
            stripes = 128 + 90 * np.sin(wave * np.pi / 2 + random.uniform(0, 6))[..., None]
            pixels = (stripes + random.normal(0, 20, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def config(base, images, tmp_path):
    return ClassifyConfig(
        pretrained_model_name_or_path=str(base),
        train_data_dir=str(images),
        output_dir=str(tmp_path / "out"),
        resolution=16,
        validation_share=0.25,
        test_share=0.25,
        max_train_steps=4,
        train_batch_size=8,
        validation_steps=2,
    )


@pytest.fixture
def with_method(tmp_path):
    """Changes the method of a config."""

    def change(config, method, **fields):
        rate = {"linear": None, "full": 1e-2}.get(method, 3e-2)
        if method == "lora":
            (tmp_path / "lora.json").write_text(json.dumps(LORA))
            method = str(tmp_path / "lora.json")
        return dataclasses.replace(config, adapter=method, learning_rate=rate, **fields)

    return change


@pytest.fixture
def logits():
    """Gives the logits of a model for some noise."""
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def predict(model):
        with torch.no_grad():
            return model.eval()(pixels).logits

    return predict


@pytest.fixture
def trained(monkeypatch):
    """Collects the trained models of runs."""
    models, save = [], training.save_classifier

    def collect(folder, model, *rest):
        models.append(model)
        save(folder, model, *rest)

    monkeypatch.setattr(training, "save_classifier", collect)
    return models


@pytest.fixture
def untrained():
    """Opens the model of a run as it is before training."""
    return lambda config: open_model(
        config.pretrained_model_name_or_path, ["across", "down", "tilted"], seed=config.seed
    )


METHODS = {
    "atoms": {"peft_type": "ATOMS", "target_modules": "conv", "channel_block": 4},
    "lora": LORA,
    "norms": {"peft_type": "LN_TUNING", "target_modules": ["normalization"]},
    "loha": {"peft_type": "LOHA", "target_modules": ["convolution"], "r": 2},
    "mona": {"peft_type": "MONA", "hidden_size": 4},
    "conv_adapter": {"peft_type": "CONV_ADAPTER"},
}
COMBINED = {"peft_type": "COMBINED", "methods": [{"peft_type": "ATOMS", "target_modules": "all"}, METHODS["mona"]]}


@pytest.fixture(scope="module")
def patches(base, images, tmp_path_factory):
    """Trained classifiers of one base by name: adapters, probes, with and without statistics of their own."""
    folder = tmp_path_factory.mktemp("patches")
    for name in ("across", "down"):
        shutil.copytree(images / name, folder / "two" / name)
    trained = {}
    for number, name in enumerate((*METHODS, "frozen", "linear", "followed", "combined")):
        adapter = COMBINED if name == "combined" else METHODS.get(name, METHODS["atoms"])
        (folder / f"{name}.json").write_text(json.dumps(adapter))
        probe = name in ("linear", "followed")
        train_classifier(
            ClassifyConfig(
                pretrained_model_name_or_path=str(base),
                train_data_dir=str(folder / "two" if number % 2 else images),
                output_dir=str(folder / name),
                adapter="linear" if probe else str(folder / f"{name}.json"),
                learning_rate=None if probe else 3e-2,
                batch_norm={"frozen": "frozen", "followed": "updated"}.get(name),
                max_train_steps=4,
                train_batch_size=8,
                resolution=16,
                seed=number,
            )
        )
        trained[name] = folder / name / "classifier"
    return trained
