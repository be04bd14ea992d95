"""Vision models of transformers as encoders: which of their outputs is the embedding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from atomdiff.evaluate.encoders import Recognizer, TextEncoder, VisionEncoder, check_encoder, open_encoders
from atomdiff.toybox.judge import Judge
from atomdiff.utils.errors import UserError
from tests.helpers import change_tensors

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 32, "patch_size": 8}


def images(count, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


def save(folder, model):
    """Write a model with random weights, and a processor that makes 32x32 pixels of an image."""
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_clip(tmp_path):
    torch.manual_seed(0)
    letters = [letter + end for letter in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate([*sorted(letters), "<|startoftext|>", "<|endoftext|>"])}
    vocab, merges = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>")).model.save(str(tmp_path))
    CLIPTokenizer(vocab, merges, model_max_length=64).save_pretrained(tmp_path)
    end = vocabulary["<|endoftext|>"]
    text = {**SMALL, "vocab_size": len(vocabulary), "max_position_embeddings": 64, "eos_token_id": end}
    text |= {"bos_token_id": end - 1, "pad_token_id": end}
    return save(tmp_path, CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, **SQUARE}, projection_dim=8)))


def test_clip_embeds_images_and_texts_in_one_space(tiny_clip):
    encoder = VisionEncoder(tiny_clip, batch_size=4)
    assert isinstance(encoder, TextEncoder) and not isinstance(encoder, Recognizer)
    given = images(9)
    embeddings = encoder.embed(given)
    assert embeddings.shape == (9, 8)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(9), atol=1e-5)
    assert torch.allclose(embeddings[6:7], encoder.embed(given[6:7]), atol=1e-5)  # whatever else is in its batch
    texts = ["a red mug", "a cat", "x " * 200]
    embedded = encoder.embed_texts(texts)
    assert embedded.shape == (3, 8) and torch.allclose(embedded[1:2], encoder.embed_texts(texts[1:2]), atol=1e-5)
    pixels = encoder.processor(images=given, return_tensors="pt")["pixel_values"]
    inputs = encoder.tokenizer(texts[:1], return_tensors="pt")  # without padding, which must not change anything
    with torch.no_grad():
        model = encoder.model(pixel_values=pixels, **inputs)
    assert torch.allclose(model.image_embeds, embeddings, atol=1e-5)
    assert torch.allclose(model.text_embeds, embedded[:1], atol=1e-5)


@pytest.mark.parametrize("kind", [(ViTConfig, ViTModel), (Dinov2Config, Dinov2Model)], ids=["dino", "dinov2"])
def test_of_dino_the_class_token_is_compared(kind, tmp_path):
    config, model = kind
    torch.manual_seed(0)
    encoder = VisionEncoder(save(tmp_path, model(config(**SMALL, **SQUARE))))
    assert not isinstance(encoder, TextEncoder)
    pixels = encoder.processor(images=images(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = encoder.model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(encoder.embed(images(3)), torch.nn.functional.normalize(token), atol=1e-6)


def test_of_a_convolutional_network_the_pooled_output_is_compared(tmp_path):
    torch.manual_seed(0)
    encoder = VisionEncoder(save(tmp_path, ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))))
    pixels = encoder.processor(images=images(2), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = encoder.model(pixel_values=pixels).pooler_output
    assert torch.allclose(encoder.embed(images(2)), torch.nn.functional.normalize(pooled), atol=1e-6)


def test_of_the_vision_part_of_clip_the_projection_is_compared(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SMALL, **SQUARE, projection_dim=8)
    encoder = VisionEncoder(save(tmp_path, CLIPVisionModelWithProjection(config)))
    pixels = encoder.processor(images=images(2), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        projected = encoder.model(pixel_values=pixels).image_embeds
    assert projected.shape == (2, 8)
    assert torch.allclose(encoder.embed(images(2)), torch.nn.functional.normalize(projected), atol=1e-6)


@pytest.fixture
def tiny_vit(tmp_path):
    torch.manual_seed(0)
    return save(tmp_path, ViTModel(ViTConfig(**SMALL, **SQUARE)))


def change_weights(folder, change):
    change_tensors(Path(folder) / "model.safetensors", change)


def test_weights_that_no_embedding_depends_on_may_be_missing(tiny_vit):
    before = VisionEncoder(tiny_vit).embed(images(2))
    change_weights(tiny_vit, lambda found: {key: each for key, each in found.items() if "pooler" not in key})
    assert torch.equal(VisionEncoder(tiny_vit).embed(images(2)), before)  # as in facebook/dino-vits16


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {f"module.{key}": each for key, each in found.items()},
        lambda found: {key: each for key, each in found.items() if "layer.1." not in key},
        lambda found: {key: each[:1].clone() if "layer.1." in key else each for key, each in found.items()},
    ],
    ids=["other names", "a layer less", "other shapes"],
)
def test_weights_that_are_missing_are_named_instead_of_random(tiny_vit, change):
    change_weights(tiny_vit, change)
    with pytest.raises(UserError, match=r"its files lack weights, .*\(.+ and \d+ more\); expected a complete"):
        VisionEncoder(tiny_vit)


def test_weights_that_are_not_finite_are_refused(tiny_vit):
    change_weights(tiny_vit, lambda found: {key: each * torch.nan for key, each in found.items()})
    with pytest.raises(UserError, match="its embeddings are not finite, .* expected the weights as published"):
        VisionEncoder(tiny_vit)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_damaged_file_is_one_clear_line(tiny_vit, file):
    damaged = Path(tiny_vit) / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be loaded \(.+\); expected a vision model of transformers"):
        VisionEncoder(tiny_vit)


def test_a_model_of_another_size_than_its_config_says_is_refused(tiny_vit):
    file = Path(tiny_vit) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(UserError, match="or have them in other shapes than its config.json says"):
        VisionEncoder(tiny_vit)


def test_an_encoder_of_texts_without_its_vocabulary_is_refused(tiny_clip):
    for file in Path(tiny_clip).iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            file.unlink()
    with pytest.raises(UserError, match=r"its tokenizer reads .* as the same; expected its vocabulary \(tokenizer\."):
        VisionEncoder(tiny_clip)


def test_weights_of_texts_that_are_missing_are_named(tiny_clip):
    change_weights(tiny_clip, lambda found: {key: each for key, each in found.items() if "text_projection" not in key})
    with pytest.raises(UserError, match=r"its files lack weights, .*\(text_projection.weight\)"):
        VisionEncoder(tiny_clip)


def test_a_model_that_masks_images_at_random_is_refused(tmp_path):
    folder = save(tmp_path, ViTMAEModel(ViTMAEConfig(**SMALL, **SQUARE)))
    with pytest.raises(UserError, match="embeds the same image in two ways"):
        VisionEncoder(folder)


def test_a_model_of_texts_is_refused(tmp_path):
    folder = save(tmp_path, BertModel(BertConfig(**SMALL, vocab_size=20)))
    with pytest.raises(UserError, match="found a BertModel"):
        VisionEncoder(folder)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the encoder '.*nowhere' cannot be loaded .*such as \"facebook/dino-vits16\""):
        VisionEncoder(str(tmp_path / "nowhere"))


def test_the_judge_of_the_toybox_is_named_like_an_encoder():
    encoders = open_encoders(["toybox", "toybox"], "cpu")
    assert [*encoders] == ["toybox"] and isinstance(encoders["toybox"], Judge)
    check_encoder("toybox")
