"""Fixtures of the tests of the page."""

from pathlib import Path

import pytest
import yaml

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.ui.config import UiConfig
from tests.sampling.helpers import write_concept


@pytest.fixture
def ui_config(tmp_path, tiny_pipe_folder):
    """A page on the tiny pipeline, whose runs take two steps."""
    options = {
        "train_batch_size": 2,
        "max_train_steps": 2,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "validation_steps": 1,
        "logging_steps": 1,
        "validation_loss_steps": 1,
        "save_steps": 1,
    }
    file = tmp_path / "train_config.yaml"
    file.write_text(yaml.safe_dump(options))
    return UiConfig(
        pretrained_model_name_or_path=str(tiny_pipe_folder),
        library=str(tmp_path / "library"),
        output_dir=str(tmp_path / "ui"),
        train_config=str(file),
    )


@pytest.fixture
def concept_file(tmp_path, tiny_pipe):
    """The file of a concept of the tiny pipeline, with the trigger phrase "sks mug"."""
    return Path(write_concept(tiny_pipe, tmp_path / "made" / "mug.atoms.safetensors"))


@pytest.fixture
def library(tmp_path):
    """An empty library."""
    (tmp_path / "library").mkdir(exist_ok=True)
    return ConceptLibrary(tmp_path / "library")
