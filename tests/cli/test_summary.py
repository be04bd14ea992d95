"""What `atomdiff inspect` prints."""

import re

import pytest
import torch
from peft import ShiraConfig

import atomdiff
from atomdiff.cli.summary import describe
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError


def test_a_file_is_described(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(channel_block=4, target_modules=["conv_in", "to_q"]))
    add_placeholder_token(tiny_pipe, "sks")
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.zeros(32)})
    path = tmp_path / "mug.atoms.safetensors"
    training = {"max_train_steps": 300, "optimizer": "adamw", "config": {"long": "list"}}
    atomdiff.save_atoms(
        tiny_pipe, path, trigger_phrase="a photo of sks mug", training=training, base_model="samples/toybox-sd"
    )
    text = describe(path)
    for expected in (
        "concept +mug",
        "trigger phrase +a photo of sks mug",
        "trigger words +sks",
        "base +samples/toybox-sd",
        "made for +stable-diffusion/atoms, 32x32, v",
        "method +all atoms, basis svd, channel blocks of 4",
        r"parameters +2,417 trained \(32 in trigger words\)",
        f"bytes +{path.stat().st_size:,}",
        "training +max_train_steps 300, optimizer adamw$",
        "unet atom_delta +9 x 9 +1 +81",
        r"unet channel_delta +16 x 16 +\d+ +\d",
    ):
        assert re.search(f"^{expected}", text, re.MULTILINE), expected
    assert "distance" not in text


def test_a_folder_of_another_method_is_described(tiny_pipe, tiny_pipe_folder, tmp_path):
    tiny_pipe.unet.add_adapter(ShiraConfig(r=2, target_modules=["to_q"]))
    add_placeholder_token(tiny_pipe, "sks")
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.zeros(32)})
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug")
    trained = sum(parameter.numel() for parameter in tiny_pipe.unet.parameters() if parameter.requires_grad)
    text = describe(path)
    for expected in (
        "concept +mug",
        "trigger words +sks",
        "method +SHIRA",
        rf"parameters +{trained + 32:,} trained \(32 in trigger words\)",
        f"bytes +{sum(file.stat().st_size for file in path.iterdir()):,}",
        r"shira_weight +\d+ +\d+ +\d",
    ):
        assert re.search(f"^{expected}", text, re.MULTILINE), expected
    assert "indices" not in text
    with pytest.raises(UserError, match="holds no concept"):
        describe(tiny_pipe_folder)


@pytest.mark.slow
def test_the_quality_of_sparse_coefficients_is_stated(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(basis="sparse", target_modules=["conv_in", "to_q"], sparsity=0.05))
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    error, zeros = re.search(
        r"^coefficients +relative reconstruction error (\S+), (\S+) % zeros", describe(path, tiny_pipe), re.M
    ).groups()
    assert 0.05 < float(error) < 0.9 and 5 < float(zeros) < 95
    assert "coefficients" not in describe(path)


def test_the_distance_to_a_base_is_stated(tiny_pipe, tiny_pipe_folder, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig())
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    assert re.search("distance +0 ", describe(path, tiny_pipe))
    assert re.search("distance +0 ", describe(path, tiny_pipe_folder))
    for parameter in tiny_pipe.unet.parameters():
        parameter.data *= 3
    assert re.search(r"distance +0\.667 ", describe(path, tiny_pipe))
