"""A base is opened with a head of its own, whole or not at all, and with its preprocessing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, ResNetForImageClassification

from atomdiff.classify.model import open_model, open_processor
from atomdiff.classify.train import train_classifier
from atomdiff.utils.errors import UserError


def first_weight(model):
    return model.resnet.embedder.embedder.convolution.weight


@pytest.fixture
def own_base(base, tmp_path):
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_head_of_the_same_size_is_replaced_too_and_follows_from_the_seed(base):
    pretrained = ResNetForImageClassification.from_pretrained(base)
    one, again, other = (open_model(str(base), list("abcde"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first_weight(one), first_weight(pretrained))
    heads = [model.classifier[1].weight for model in (one, again, other, pretrained)]
    assert [torch.equal(heads[0], head) for head in heads] == [True, True, False, False]


def test_the_bases_own_preprocessing_is_used_unless_a_resolution_is_asked_for(config, base, untrained, tmp_path):
    model = untrained(config)
    plain = open_processor(str(base), model)
    assert plain.size["shortest_edge"] == 224  # a ResNet's config does not know its images' size
    own = type(plain)(size={"shortest_edge": 20}, image_mean=[0.1] * 3, crop_pct=1.0)
    for part in base.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    own.save_pretrained(tmp_path)
    for resolution, side in ((None, 20), (16, 16)):
        processor = open_processor(str(tmp_path), model, resolution=resolution)
        pixels = processor(Image.new("RGB", (30, 40)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, side, side) and list(processor.image_mean) == [0.1] * 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_from_scratch_is_in_float32_whatever_its_config_says(config, own_base, dtype):
    change(own_base / "config.json", dtype=dtype)
    assert open_model(str(own_base), "abc", from_scratch=True).dtype == torch.float32
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(own_base), from_scratch=True)
    report = train_classifier(dataclasses.replace(config, adapter="full"))
    assert report["trainable_share"] == 1.0 and report["config"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("fields", "lost"),
    [({"depths": [1, 2]}, "layers.1.layer.0.convolution.weight"), ({"hidden_sizes": [8, 24]}, "convolution.weight")],
)
def test_a_base_whose_weights_would_partly_be_random_is_refused(own_base, fields, lost):
    change(own_base / "config.json", **fields)
    with pytest.raises(UserError, match=f"its weights lack .*{lost}"):
        open_model(str(own_base), "abc")


def test_damaged_weights_are_a_user_error(own_base):
    weights = own_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="neither a folder with an image classifier .*header"):
        open_model(str(own_base), "abc")


def test_a_model_without_a_head_of_its_own_is_a_user_error(base, monkeypatch):
    build = ResNetForImageClassification.__init__

    def headless(self, config):
        build(self, config)
        self.resnet.classifier, self.classifier = self.classifier, torch.nn.Identity()

    monkeypatch.setattr(ResNetForImageClassification, "__init__", headless)
    with pytest.raises(UserError, match="cannot be split into head and base"):
        open_model(str(base), "abc", from_scratch=True)


def test_damaged_preprocessing_is_refused_and_not_replaced_by_another(own_base):
    (own_base / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json: cannot be used .*; repair or remove it"):
        open_processor(str(own_base), open_model(str(own_base), "abc"))


def test_a_model_that_is_no_classifier_is_a_user_error(config, tmp_path):
    base = tmp_path / "base"
    CLIPConfig().text_config.save_pretrained(base)
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(base), from_scratch=True, adapter="full")
    with pytest.raises(UserError, match="neither a folder with an image classifier"):
        train_classifier(config)
