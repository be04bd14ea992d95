"""Bytes and trained parameters of stored concepts."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import atomdiff
from atomdiff.evaluate.size import num_trainable_parameters, stored_bytes
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding


@pytest.mark.parametrize("config", [atomdiff.AtomConfig(channel_block=4), LoraConfig(r=2, target_modules=["to_q"])])
def test_a_stored_concept_counts_what_was_trained(tiny_pipe, tmp_path, config):
    tiny_pipe.unet.requires_grad_(False)
    tiny_pipe.unet.add_adapter(config)
    add_placeholder_token(tiny_pipe, "sks")
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.zeros(32)})
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "concept")
    trained = sum(p.numel() for p in tiny_pipe.unet.parameters() if p.requires_grad)
    assert trained > 0
    assert num_trainable_parameters(path) == trained + 32


def test_of_a_pipeline_the_denoiser_counts(tiny_pipe, tiny_pipe_folder):
    assert num_trainable_parameters(tiny_pipe_folder) == sum(p.numel() for p in tiny_pipe.unet.parameters())


def test_bytes_of_files_and_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "inner" / "b").write_bytes(b"678")
    assert stored_bytes(tmp_path / "a") == 5
    assert stored_bytes(tmp_path) == 8


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        stored_bytes(tmp_path / "nowhere")
    save_file({"x.atom_delta": torch.zeros(2, 3), "x.atom_basis": torch.zeros(2, 9)}, tmp_path / "x.safetensors")
    assert num_trainable_parameters(tmp_path / "x.safetensors") == 6
