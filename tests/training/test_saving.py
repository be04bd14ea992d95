"""The result of a run is written whole, replaces nothing else, and is not lost."""

import dataclasses
import shutil
import tempfile

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training import saving
from atomdiff.training.dreambooth import train
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_kept_elsewhere(config, monkeypatch, tmp_path):
    usual, temporary = saving.save_trained, tmp_path / "temporary"

    def full(pipe, adapter, path, **metadata):
        if path.is_relative_to(config.output_dir):
            raise WriteError(path, "No space left on device", "free some space")
        usual(pipe, adapter, path, **metadata)

    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(saving, "save_trained", full)
    with pytest.raises(
        WriteError, match=r"teapot.atoms.safetensors: cannot be written \(No space.* is in .*temporary"
    ) as error:
        train(config)
    (kept,) = temporary.rglob("teapot.atoms.safetensors")
    assert str(kept) in str(error.value) and read_concept_file(kept).training["steps"] == 4


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_result_that_would_replace_its_own_base_is_refused(config, tiny_pipe_folder, method, adapter_file, tmp_path):
    base = tmp_path / "models" / "teapot"
    shutil.copytree(tiny_pipe_folder, base)
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    fields = {"pretrained_model_name_or_path": str(base), "output_dir": str(base.parent)}
    with pytest.raises(UserError, match="teapot: the result would replace .* the run reads; name another output_dir"):
        train(dataclasses.replace(config, adapter=adapter_file(method), **fields))
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_tuned_pipeline_that_cannot_be_written_leaves_the_earlier_one(config, small_files):
    config = dataclasses.replace(config, adapter="full", train_token=False, max_train_steps=1, learning_rate=1e-3)
    folder = train(config)
    (folder / "README.md").write_text("mine")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    size = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    with small_files(size - 100), pytest.raises(WriteError, match="teapot: cannot be written"):
        train(dataclasses.replace(config, learning_rate=1e-2))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    train(dataclasses.replace(config, learning_rate=1e-2))
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert after.keys() == before.keys() and after[folder / "README.md"] == b"mine" and after != before
