"""Saved concepts: what is in the files, and that it is the same each time."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.modelspec import model_spec
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import predict
from tests.pipelines.helpers import train


def test_half_precision_files_are_small_and_close(tiny_pipe, tmp_path):
    train(tiny_pipe)
    trained = predict(tiny_pipe)
    atomdiff.save_atoms(tiny_pipe, tmp_path / "x")
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "x")
    torch.testing.assert_close(predict(tiny_pipe), trained, atol=5e-3, rtol=0)
    with safe_open(tmp_path / "x", "pt") as file:
        numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert (tmp_path / "x").stat().st_size < 2 * numbers + 60_000


def test_saved_again_the_file_is_the_same(tiny_pipe, concepts, tmp_path):
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "default")
    atomdiff.merge(tiny_pipe)  # the fingerprint is that of the untouched weights all the same
    atomdiff.save_atoms(tiny_pipe, tmp_path / "atoms.atoms.safetensors", dtype=torch.float32, trigger_phrase="a mug")
    with safe_open(concepts["atoms"], "pt") as one, safe_open(tmp_path / "atoms.atoms.safetensors", "pt") as two:
        first, second = one.metadata(), two.metadata()
        assert first.pop("modelspec.date")[:2] == second.pop("modelspec.date")[:2] == "20"
        assert first == second
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k)) for k in one.keys())  # noqa: SIM118


@pytest.mark.slow
def test_peft_directories_are_the_same_bytes_each_time(tiny_pipe, tmp_path):
    train(tiny_pipe, "lora", word="ohwx")
    for name in "abcdefgh":
        atomdiff.save_atoms(tiny_pipe, tmp_path / name, training={"steps": 3})
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abcdefgh"]
    assert all(each == files[0] for each in files) and len(files[0]) == 3
    assert list(load_file(tmp_path / "a" / "learned_embeds.safetensors")) == ["token.ohwx"]
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["to_q", "to_v", "conv1"]
    )


def test_the_file_says_what_it_is(tiny_pipe, concepts):
    concept = read_concept_file(concepts["atoms"])
    assert concept.trigger_phrase == "a mug" and list(concept.tokens) == ["sks"]
    assert {module.partition(".")[0] for module in concept.layers} == {"unet", "text_encoder"}
    assert concept.modelspec["architecture"] == "stable-diffusion/atoms" and concept.modelspec["resolution"] == "32x32"
    assert concept.modelspec["prediction_type"] == "v" and concept.modelspec["title"] == "atoms"


def test_the_date_can_be_given_so_that_files_are_the_same_bytes(tiny_pipe, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert model_spec(tiny_pipe, "mug")["date"] == "2023-11-14T22:13:20+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="'yesterday': expected whole seconds"):
        model_spec(tiny_pipe, "mug")


def test_components_with_different_atoms_are_not_saved_in_one_file(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(channel_block=4, target_modules="attention"))
    tiny_pipe.text_encoder.add_adapter(AtomConfig(channel_block=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="other atoms in text_encoder than in unet|other atoms in unet than in text"):
        atomdiff.save_atoms(tiny_pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_only_dtypes_that_hold_a_concept_are_written(tiny_pipe, tmp_path):
    train(tiny_pipe)
    with pytest.raises(UserError, match="dtype=torch.int8: expected one of torch.float16, torch.bfloat16"):
        atomdiff.save_atoms(tiny_pipe, tmp_path / "x", dtype=torch.int8)
    assert not list(tmp_path.iterdir())
